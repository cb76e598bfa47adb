"""Finding a model's settings by drawing: placements of DeepCache's compute calls, a first-block threshold.

Placements: dynamic programming proposes, real runs decide. A few pictures are drawn uncached while the branch's states
are recorded. What a reuse would get wrong, weighed by how far the sampler goes on its word, gives candidates
(`cache/tuning/placement.py`); as errors grow or fade on their way to the picture, several weights are tried. Each
candidate then draws the same pictures. The one nearest to the uncached ones is kept if it beats the uniform placement
by more than chance would.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from cache import CacheError, CacheStrategy, DeepCache, FirstBlockCache, UNetDenoiser
from cache.deepcache.schedule import GROWTH, budget, warped
from cache.flops import deepest_branch
from cache.tuning.placement import Search
from cache.tuning.recorder import BranchRecorder, ResidualRecorder
from cache.tuning.threshold import Found, threshold_for
from models.base import GenerationParams, StepHook
from models.errors import ModelError

from .nearness import psnr
from .placements import Calibrated

if TYPE_CHECKING:
    from models.generation import LoadedModel

POWERS = (1.0, 1.5)  # of a call's weight: 1 gives the next latent's error; above it early errors count for less
GROWTHS = (1.0, GROWTH)  # of placements that look at timesteps alone
CAUTION = 1.4  # standard errors by which a gain has to exceed zero: one chance in ten with eight pictures
LONGEST = 2.5  # gap between computed calls, in intervals

Draw = Callable[[CacheStrategy], Sequence[ArrayLike]]  # the same 8-bit pictures each time, under that strategy
Known = Callable[[str, Callable[[], Any]], Any]


def calibrate(
    draw: Draw,
    view: UNetDenoiser,
    scheduler: Any,
    *,
    sampler: tuple[str, str],
    steps: int,
    intervals: Sequence[int],
    depth: int = 2,
    progress: Callable[[str], None] = lambda stage: None,
    known: Known = lambda name, measure: measure(),
) -> list[Calibrated]:
    """One entry an interval.

    scheduler: the model's own, for its noise schedule and prediction type. sampler: the names of the one that `draw`
    uses and of its scheduler, for the entries. progress: told before each round of pictures what it is for; what it
    raises passes. known: gives a measurement by its name, or makes it (`kept.py`).
    """
    branch = deepest_branch(view.branch_costs, depth)
    recorder = BranchRecorder(branch)
    progress("uncached")
    reference = draw(recorder)
    states = torch.cat(recorder.runs)
    calls = states.shape[1]
    weights = sensitivities(scheduler, recorder.timesteps)
    found = []
    for interval in intervals:
        search = Search(states, DeepCache().forecast, math.ceil(LONGEST * interval))
        count = budget(calls, interval)
        proposed = [search.best(count, [weight**power for weight in weights]) for power in POWERS]
        proposed += [warped(calls, count, growth, recorder.timesteps) for growth in GROWTHS]
        uniform = tuple(range(0, calls, interval))
        nearness: dict[tuple[int, ...], list[float]] = {}

        def drawn(computed: tuple[int, ...], interval: int = interval, number: int = 0) -> list[float]:
            progress(f"interval {interval}, placement {number}")
            pictures = draw(DeepCache(interval, depth, schedule=computed))
            return [psnr(*pair) for pair in zip(reference, pictures, strict=True)]

        for number, computed in enumerate(dict.fromkeys([uniform, *filter(None, proposed)]), start=1):
            name = (
                f"{sampler}, {steps} steps, interval {interval}, depth {depth}, {len(reference)} pictures, {computed}"
            )
            nearness[computed] = known(name, partial(drawn, computed, interval, number))
        best, gain = chosen(uniform, nearness)
        found.append(
            Calibrated(
                sampler=sampler[0],
                scheduler=sampler[1],
                steps=steps,
                interval=interval,
                branch=branch,
                calls=calls,
                computed=best,
                gain_db=round(gain, 2),
                pictures=len(reference),
            )
        )
    return found


def generated(model: LoadedModel, params: GenerationParams, prompts: Sequence[str]) -> Draw:
    """What `calibrate` draws with: the pictures of `params` and its seeds, for each of `prompts`."""

    def draw(strategy: CacheStrategy) -> list[ArrayLike]:
        pictures: list[ArrayLike] = []
        for prompt in prompts:
            drawn = model.generate(replace(params, prompt=prompt), strategy, lambda step: None)
            pictures += [np.asarray(image) for image in drawn.images]
        return pictures

    return draw


def rounds(intervals: Sequence[int]) -> int:
    """How often `calibrate` draws its pictures at most."""
    return 1 + len(intervals) * (1 + len(POWERS) + len(GROWTHS))


def chosen(
    uniform: tuple[int, ...], nearness: Mapping[tuple[int, ...], Sequence[float]]
) -> tuple[tuple[int, ...], float]:
    """The placement that is surest to beat `uniform`, and its mean gain in dB; `uniform` itself if none is.

    nearness: each placement's PSNR to the same uncached pictures. Sure is the mean gain less CAUTION standard errors.
    """
    best, gain, surest = uniform, 0.0, 0.0
    for computed, values in nearness.items():
        gains = [own - even for own, even in zip(values, nearness[uniform], strict=True)]
        mean = statistics.mean(gains)
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        if mean - CAUTION * error > surest:
            best, gain, surest = computed, mean, mean - CAUTION * error
    return best, gain


def sensitivities(scheduler: Any, timesteps: Sequence[float]) -> list[float]:
    """How far a unit of error in each call's prediction moves the next latent, to first order.

    With cos φ the signal's share of a latent, a step from φ to φ' turns the latent by φ - φ', so that the velocity
    enters it sin (φ - φ') times (Salimans and Ho 2022, "Progressive Distillation", appendix D). An error in the noise
    counts 1 / cos φ times as much, one in the sample 1 / sin φ times. Calls at one timestep share its step.
    """
    alphas = scheduler.alphas_cumprod.double().cpu().numpy()
    phases = np.arccos(np.sqrt(np.interp(timesteps, np.arange(len(alphas)), alphas)))
    kind = scheduler.config.get("prediction_type", "epsilon")
    found = []
    for call, timestep in enumerate(timesteps):
        later = [after for after, other in enumerate(timesteps) if after > call and other < timestep]
        turn = math.sin(phases[call] - (phases[later[0]] if later else 0.0))
        scale = {"epsilon": math.cos(phases[call]), "sample": math.sin(phases[call])}.get(kind, 1.0)
        found.append(turn / scale / list(timesteps).count(timestep))
    return found


def find_threshold(
    model: LoadedModel,
    params: GenerationParams,
    speedup: float,
    settings: FirstBlockCache,
    on_step: StepHook,
    prompts: Sequence[str],
) -> Found:
    """The lowest threshold that promises `speedup` for pictures like `params`, one of each prompt, at its own seed.

    Raises ModelError where the model has no first-block cache or no threshold reaches that far.
    """
    recorder = ResidualRecorder()
    try:
        for number, prompt in enumerate(prompts):
            one = replace(params, prompt=prompt, seeds=(params.seeds[0] + number,), batch_size=1)
            model.generate(one, recorder, on_step)
        return threshold_for(recorder, speedup, settings)
    except CacheError as error:
        raise ModelError(str(error)) from error
