"""A model of full size on the simulated device. Its weights wait on the CPU in the memory of one number each."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.geometries import Geometry
from cache.views import transformer
from models.generation import LoadedModel

from .device import NAME, hollow


def load(geometry: Geometry, memory: int | None = None, **options: Any) -> LoadedModel:
    """Within an Accelerator's context. memory: bytes that a plan may count on. options: of the ModelSpec."""
    model = geometry.load(NAME, hollow, memory, **options)
    _counted_once(geometry.name, model.denoiser.root)
    return model


_FIRST: dict[str, nn.Module] = {}


def _counted_once(name: str, root: nn.Module) -> None:
    """Operations are counted for each transformer anew, and here all of a name are alike."""
    first = _FIRST.setdefault(name, root)
    if first in transformer._FIRST_BLOCK_COSTS:
        transformer._FIRST_BLOCK_COSTS[root] = transformer._FIRST_BLOCK_COSTS[first]
