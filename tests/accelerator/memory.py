"""Bytes of a run by its parts: weights, the peak while denoising and while decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import no_grad

from benchmarks.geometries import Geometry
from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.base import GenerationParams
from models.stages.drawing import Clock

from .device import Accelerator
from .loading import load


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes. weights: on the device before a request. working: what the server's admission counts beside them."""

    weights: int
    text: int
    denoise: int
    decode: int
    kept: int
    working: int


def strategies(geometry: Geometry) -> dict[str, CacheStrategy]:
    """By name: none, and the family's cache as it is by default, made to keep all that it can."""
    flux = geometry.family.startswith("flux")
    return {"none": NoCache(), "default": FirstBlockCache(max_consecutive=1) if flux else DeepCache(interval=2)}


def peaks(geometry: Geometry, strategy: CacheStrategy, *, images: int = 1, steps: int = 4, **options: Any) -> Peaks:
    """Of a request at the geometry's size, on a device of its own; in 4 steps a cache keeps all that it can.

    options: of the ModelSpec.
    """
    device = Accelerator()
    found: dict[str, int] = {}
    own = Clock.__call__

    @contextmanager
    def counted(self: Clock, part: str) -> Iterator[None]:
        with device.counting() as counts, own(self, part):
            yield
        found[part] = max(found.get(part, 0), counts.peak)

    with device, no_grad(), patch.object(Clock, "__call__", counted):
        model = load(geometry, **options)
        weights = device.live
        params = GenerationParams(
            prompt="a cat",
            width=geometry.width,
            height=geometry.height,
            steps=steps,
            guidance_scale=geometry.guidance_scale,
            sampler="euler",
            seeds=tuple(range(images)),
            batch_size=images,
        )
        working = model.working_bytes(params, images)
        made = model.generate(params, strategy, lambda step: None)
        kept = made.reports[0].cache_bytes
    return Peaks(weights, found["text"], found["denoise"], found["decode"], kept, working)
