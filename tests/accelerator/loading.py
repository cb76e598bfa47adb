"""A model of full size on the simulated device. Its weights wait on the CPU in the memory of one number each."""

from __future__ import annotations

from typing import Any

from benchmarks.geometries import Geometry
from models.generation import LoadedModel

from .device import NAME, hollow


def load(geometry: Geometry, memory: int | None = None, **options: Any) -> LoadedModel:
    """Within an Accelerator's context. memory: bytes that a plan may count on. options: of the ModelSpec."""
    return geometry.load(NAME, hollow, memory, **options)
