"""A threshold for a model: a few uncached pictures, then the search of `cache/tuning/threshold.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .base import GenerationParams, LoadedModel, ModelError, StepHook

if TYPE_CHECKING:
    from cache import FirstBlockCache
    from cache.tuning.threshold import Found

PROMPTS = ("a misty forest at twilight", "a clear sea at noon", "a snowy island at dawn", "a stormy desert at sunset")


def find(
    model: LoadedModel,
    params: GenerationParams,
    speedup: float,
    settings: FirstBlockCache,
    on_step: StepHook,
    prompts: Sequence[str] = PROMPTS,
) -> Found:
    """The lowest threshold that promises `speedup` for pictures like `params`, one of each prompt, at its own seed.

    Raises ModelError where the model has no first-block cache or no threshold reaches that far.
    """
    from cache import CacheError
    from cache.tuning.recorder import ResidualRecorder
    from cache.tuning.threshold import threshold_for

    recorder = ResidualRecorder()
    try:
        for number, prompt in enumerate(prompts):
            one = replace(params, prompt=prompt, seeds=(params.seeds[0] + number,), batch_size=1)
            model.generate(one, recorder, on_step)
        return threshold_for(recorder, speedup, settings)
    except CacheError as error:
        raise ModelError(str(error)) from error
