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
from models.generation import LoadedModel
from models.loading.plan import VAE
from models.stages.drawing import Clock

from .device import Accelerator
from .loading import load


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes. weights: on the device before a request. working: what the server's admission counts beside them.

    plan: as `GET /api/models` has it, where there was one.
    """

    weights: int
    text: int
    denoise: int
    decode: int
    kept: int
    working: int
    plan: dict[str, Any] | None = None

    @property
    def most(self) -> int:
        return max(self.text, self.denoise, self.decode)


def strategies(geometry: Geometry) -> dict[str, CacheStrategy]:
    """By name: none, and the family's cache as it is by default, made to keep all that it can."""
    flux = geometry.is_transformer
    return {"none": NoCache(), "default": FirstBlockCache(max_consecutive=1) if flux else DeepCache(interval=2)}


@contextmanager
def phases(device: Accelerator, model: LoadedModel) -> Iterator[dict[str, int]]:
    """Within the context, the most bytes on the device in each phase of the model's runs are added to the answer."""
    found: dict[str, int] = {}
    own, residence = Clock.__call__, model.model.residence

    @contextmanager
    def counted(self: Clock, part: str) -> Iterator[None]:
        if part == "decode" and residence is not None:
            residence.bring(VAE)  # else the phase would begin with what this sends away
        with device.counting() as counts, own(self, part):
            yield
        found[part] = max(found.get(part, 0), counts.peak)

    with patch.object(Clock, "__call__", counted):
        yield found


def request(geometry: Geometry, steps: int, images: int = 1) -> GenerationParams:
    """At the geometry's size."""
    return GenerationParams(
        prompt="a cat",
        width=geometry.width,
        height=geometry.height,
        steps=steps,
        guidance_scale=geometry.guidance_scale,
        sampler="euler",
        seeds=tuple(range(images)),
        batch_size=images,
    )


def peaks(
    geometry: Geometry,
    strategy: CacheStrategy,
    *,
    images: int = 1,
    steps: int = 4,
    memory: int | None = None,
    **options: Any,
) -> Peaks:
    """Of a request at the geometry's size, on a device of its own; in 4 steps a cache keeps all that it can.

    memory: bytes of the device that a plan may count on. options: of the ModelSpec.
    """
    device = Accelerator()
    with device, no_grad():
        model = load(geometry, memory=memory, **options)
        weights, params = device.live, request(geometry, steps, images)
        working = model.working_bytes(params, images)
        with phases(device, model) as found:
            made = model.generate(params, strategy, lambda step: None)
        kept = made.reports[0].cache_bytes
    return Peaks(weights, found["text"], found["denoise"], found["decode"], kept, working, model.model.plan_row())
