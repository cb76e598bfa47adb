"""Where the host waits in the steps of a run: by sampler and strategy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from diffusers import DiffusionPipeline

from cache import CacheStrategy, DeepCache, FirstBlockCache, FittedForecast, NoCache
from models.base import Generation, GenerationParams, Step
from models.generation import LoadedModel

from .device import Accelerator

FITTED = FittedForecast((0, 1), ((1.0,), (-0.5, 1.5), (-1.0, 2.0)))
STRATEGIES: dict[str, dict[str, CacheStrategy]] = {
    "deepcache": {
        "none": NoCache(),
        "default": DeepCache(interval=2),
        "published": DeepCache(interval=2, forecast=False, schedule="uniform"),
        "half guidance": DeepCache(interval=2, guidance="reuse"),
        "fitted": FITTED,
    },
    "first_block": {
        "none": NoCache(),
        "default": FirstBlockCache(),
        "published": FirstBlockCache(forecast=False),
        "fitted": FITTED,
    },
}
"""By the cache that acts on a family."""


class Waits:
    """What a run did: `steps` has the waits of each denoising step, by their places; `begin` those before the first."""

    def __init__(self) -> None:
        self.begin: Counter[str] = Counter()
        self.steps: list[Counter[str]] = []
        self.generation: Generation

    @property
    def most(self) -> int:
        """Of a step."""
        return max(sum(step.values()) for step in self.steps)

    @property
    def places(self) -> Counter[str]:
        return sum(self.steps, Counter())


def waits(device: Accelerator, model: LoadedModel, params: GenerationParams, strategy: CacheStrategy) -> Waits:
    """Those of one run of `params`. A step is what lies between two calls of the step hook; the first one begins with
    the pipeline's loop, when the schedule is set and the noise has been drawn."""
    waits = Waits()
    with device.counting() as counts:
        seen: Counter[str] = Counter()

        def since() -> Counter[str]:
            nonlocal seen
            new, seen = counts.waits - seen, counts.waits.copy()
            return new

        def on_step(step: Step) -> None:
            waits.steps.append(since())

        def begin() -> None:
            waits.begin += since()

        with _loop(begin):
            waits.generation = model.generate(params, strategy, on_step)
    return waits


@contextmanager
def _loop(begin: Any) -> Iterator[None]:
    """Within the context, `begin` is called where a diffusers pipeline enters its loop."""
    own = DiffusionPipeline.progress_bar

    def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin()
        return own(self, *args, **kwargs)

    with patch.object(DiffusionPipeline, "progress_bar", progress_bar):
        yield
