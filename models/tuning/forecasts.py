"""A model's fitted forecasts, found by drawing: which calls compute, and by what their predictions are weighed.

A few pictures are drawn uncached while what the sampler is told is remembered. For each number of computed calls that
gives two candidates: the calls that a search finds, as if the network did not mind latents that are a little off, and
evenly growing gaps. Each draws the same pictures, and its weights are fitted anew to what the network answered there,
twice (`cache/tuning/fitting.py`). Which of them are worth anything, other pictures tell (`halving.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache import CacheStrategy, FittedForecast, NoCache
from cache.deepcache.schedule import GROWTH, warped
from cache.tuning import fitting
from cache.tuning.fitting import Fit
from cache.tuning.recorder import PredictionRecorder

from .halving import Candidate, Pictures

SPEEDS = (1.25, 1.5, 1.6, 1.75, 2.0, 2.1, 2.25, 2.5, 2.75, 3.0, 3.15, 3.5, 4.0, 4.2, 4.5, 5.0, 6.0)  # by operations
LEAST = 3  # computed calls
ROUNDS = range(1000, 1004)  # of pictures that are fitted to: none that are measured
REFITS = 2  # of a candidate
RUNGS = (4, 8)  # as in `halving`: there are few, and near each other
DIGITS = 5  # of a weight: what is rounded away lies 100 dB below a prediction
Row = tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]  # computed calls, and weights


def counts(steps: int) -> list[int]:
    """How many calls of a run compute, of those that are tried."""
    return sorted({int(steps / speed) for speed in SPEEDS if LEAST <= int(steps / speed) < steps}, reverse=True)


def most(steps: int) -> int:
    """How many `forecasts` gives at most."""
    return 2 * len(counts(steps))


def drawings(count: int) -> int:
    """How often it draws for so many."""
    return len(ROUNDS) * (1 + REFITS * count)


def forecasts(pictures: Pictures) -> list[Candidate]:
    """What is tried; nothing for a sampler whose steps do not follow from the predictions alone.

    Nor for a checkpoint for inpainting: all its runs are over a picture, where no fitted forecast acts.
    """
    steps = pictures.params.steps
    if pictures.model.model.inpaints:
        return []
    rows: list[Any] = pictures.kept.known(f"{pictures.about}, fitted", lambda: _found(pictures, steps))
    return [Candidate(steps, FittedForecast(tuple(computed), tuple(map(tuple, weights)))) for computed, weights in rows]


def _found(pictures: Pictures, steps: int) -> list[Row]:
    uncached, moves = _drawn(pictures, NoCache(), "uncached")
    if moves is None or len(moves) != steps:
        return []
    alone = sum(map(fitting.products, uncached), start=torch.tensor(0.0))
    found: list[Row] = []
    for count in counts(steps):
        tried = {
            fit.computed: fit
            for fit in (
                fitting.fitted(alone, moves, warped(steps, count, GROWTH)),
                fitting.searched(alone, moves, count),
            )
        }
        for number, fit in enumerate(tried.values(), start=1):
            for _ in range(REFITS):
                answers, _ = _drawn(pictures, FittedForecast(*_rounded(fit)), f"{count} of {steps} calls, {number}")
                own = [fitting.unmixed(each, fit) for each in answers]
                both = sum(map(fitting.products, uncached, own), start=torch.tensor(0.0))
                fit = fitting.fitted(both, moves, fit.computed)
            found.append(_rounded(fit))
    return found


def _drawn(pictures: Pictures, strategy: CacheStrategy, name: str) -> tuple[list[Tensor], Tensor | None]:
    """What the sampler was told in each round's run, and what it makes of it."""
    model = pictures.model
    recorder = PredictionRecorder(strategy, lambda: model.model.pipeline.scheduler)
    for number in ROUNDS:
        pictures.tick(f"{name}, round {number - ROUNDS.start + 1}")
        model.generate(pictures.round(number), recorder, lambda step: None)
    return recorder.runs, recorder.moves


def _rounded(fit: Fit) -> Row:
    return fit.computed, tuple(tuple(round(weight, DIGITS) for weight in row) for row in fit.weights)
