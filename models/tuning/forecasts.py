"""A model's fitted forecasts, found by drawing: which calls compute, and by what their predictions are weighed.

A few pictures are drawn uncached while what the sampler is told is remembered. Two runs of few computed calls show what
the network answers to latents that are a little off. For each number of computed calls there are then four candidates:
evenly growing gaps, and the calls that a search finds for a network that does not mind, goes astray, or answers as it
did. Each draws the same pictures, and its weights are fitted anew to what the network answered there; the two that come
nearest do so again (`cache/tuning/fitting.py`). What they are worth, other pictures tell (`halving.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache import CacheStrategy, FittedForecast, NoCache
from cache.deepcache.schedule import GROWTH, warped
from cache.tuning import fitting
from cache.tuning.fitting import Fit, Response
from cache.tuning.recorder import PredictionRecorder

from .halving import FASTEST, Candidate, Pictures

# By operations.
SPEEDS = (1.25, 1.5, 1.6, 1.75, 2.0, 2.1, 2.25, 2.5, 2.75, 3.0, 3.15, 3.5, 4.0, 4.2, 4.5, 5.0, 6.0, 7.5)
LEAST = 3  # computed calls
ROUNDS = range(1000, 1004)  # of pictures that are fitted to: none that are measured
SHOWS = 3  # the part of all calls that compute in the runs that show what the network answers
GO_ON = 2  # candidates for a number of computed calls that are fitted anew more than once
REFITS = 2  # of those, after the first
RUNGS = (4, 8)  # as in `halving`: there are few, and near each other
DIGITS = 5  # of a weight: what is rounded away lies 100 dB below a prediction
Row = tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]  # computed calls, and weights


def counts(steps: int) -> list[int]:
    """How many calls of a run compute, of those that are tried."""
    tried = {int(steps / speed) for speed in SPEEDS}
    return sorted((one for one in tried if LEAST <= one < steps <= FASTEST * one), reverse=True)


def most(steps: int) -> int:
    """How many `forecasts` gives at most."""
    return GO_ON * len(counts(steps))


def drawings(steps: int) -> int:
    """How often it draws at most."""
    return len(ROUNDS) * (1 + 2 * 2 + len(counts(steps)) * (4 + GO_ON * REFITS))


def forecasts(pictures: Pictures) -> list[Candidate]:
    """What is tried; nothing for a sampler whose steps do not follow from the predictions alone.

    Nor for so few steps that no call can be spared, nor for a checkpoint for inpainting: all its runs are over a
    picture, where no fitted forecast acts.
    """
    steps = pictures.params.steps
    if pictures.model.model.inpaints or not counts(steps):
        return []
    rows: list[Any] = pictures.kept.known(f"{pictures.about}, fitted", lambda: _found(pictures, steps))
    return [Candidate(steps, FittedForecast(tuple(computed), tuple(map(tuple, weights)))) for computed, weights in rows]


def _found(pictures: Pictures, steps: int) -> list[Row]:
    uncached, moves = _drawn(pictures, NoCache(), "uncached")
    if moves is None or len(moves) != steps:
        return []
    alone = sum(map(fitting.products, uncached), start=torch.tensor(0.0))

    def anew(fit: Fit, name: str) -> tuple[Fit, Tensor]:
        """Fitted to what the network answered with it, and the inner products of that."""
        answers, _ = _drawn(pictures, FittedForecast(*_rounded(fit)), name)
        own = [fitting.unmixed(each, fit) for each in answers]
        both = sum(map(fitting.products, uncached, own), start=torch.tensor(0.0))
        return fitting.fitted(both, moves, fit.computed), both

    shown = []
    few = max(LEAST, steps // SHOWS)
    for fit in (fitting.fitted(alone, moves, warped(steps, few, GROWTH)), fitting.searched(alone, moves, few)):
        better, _ = anew(fit, "what is answered")
        shown.append((anew(better, "what is answered")[1], better))
    response = Response.measured(shown, moves)

    found: list[Row] = []
    for count in counts(steps):
        begun = [fitting.fitted(alone, moves, warped(steps, count, GROWTH), response)]
        begun += [fitting.searched(alone, moves, count, one) for one in (None, response.astray, response)]
        name = f"{count} of {steps} calls"
        tried = [anew(fit, name)[0] for fit in {one.computed: one for one in begun}.values()]
        for fit in sorted(tried, key=lambda one: one.error)[:GO_ON]:
            for _ in range(REFITS):
                fit, _ = anew(fit, name)
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
