"""What these tests run on: the device that TEST_DEVICE names, else the CPU. `scripts/gpu-check` sets it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.base import ModelSpec
from models.generation import LoadedModel
from models.registry import FAMILIES
from tests.models.conftest import family_folders, flux_folder, sd_folder, small_folders

__all__ = ["family_folders", "flux_folder", "sd_folder", "small_folders"]
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
PUBLISHED = ("sd15", "sd21", "sdxl", "flux-schnell", "flux-dev")

Load = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session", autouse=True)
def without_tf32() -> Iterator[None]:
    """A GPU's convolutions keep ten bits of float32's mantissa otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def load(family_folders: dict[str, Path], device: str) -> Load:
    """A published family's model at small width, by name; options: of its ModelSpec, and another `device`."""

    @functools.cache
    def load(name: str, device: str = device, **options: Any) -> LoadedModel:
        spec = ModelSpec(name=name, family=name, source=family_folders[name], **options)
        return LoadedModel(FAMILIES[name].load(spec, device))

    return load
