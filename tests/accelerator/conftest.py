"""One simulated device for the folder, and each full-size model loaded once on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.geometries import Geometry
from models.generation import LoadedModel
from tests.accelerator import loading
from tests.accelerator.device import Accelerator

Load = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def one_device() -> Accelerator:
    return Accelerator()


@pytest.fixture
def device(one_device: Accelerator) -> Iterator[Accelerator]:
    script = one_device.script
    with one_device, torch.no_grad():
        yield one_device
    one_device.script = script


@pytest.fixture(scope="session")
def loaded() -> dict[tuple[Any, ...], LoadedModel]:
    return {}


@pytest.fixture
def load(device: Accelerator, loaded: dict[tuple[Any, ...], LoadedModel]) -> Load:
    """A geometry's model by options of its ModelSpec."""

    def load(geometry: Geometry, **options: Any) -> LoadedModel:
        key = (geometry.name, *sorted(options.items()))
        if key not in loaded:
            loaded[key] = loading.load(geometry, **options)
        return loaded[key]

    return load
