"""When a reuse is allowed: where the compute calls lie, and the window along the noise schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

WHOLE_SCHEDULE = 1000  # progress units, whatever the number of training timesteps
GROWTH = 1.2  # of `warped` where nothing is calibrated: docs/decisions/compute-call-placement.md

Schedule = Literal["auto", "uniform"] | tuple[int, ...]


def check(schedule: Any) -> None:
    """Raises ValueError for what is no Schedule."""
    if schedule in ("auto", "uniform"):
        return
    if not isinstance(schedule, tuple) or any(type(call) is not int for call in schedule):
        raise ValueError(f"schedule must be auto, uniform or a tuple of the calls that compute, not {schedule!r}.")
    if schedule[:1] != (0,) or any(b <= a for a, b in pairwise(schedule)):
        raise ValueError(f"schedule must name calls that begin with 0 and ascend, not {schedule!r}.")


def budget(calls: int, interval: int) -> int:
    """How many of `calls` calls compute, however they are placed."""
    return math.ceil(calls / interval)


def warped(calls: int, count: int, growth: float, timesteps: Sequence[float] | None = None) -> tuple[int, ...]:
    """The k-th of `count` compute calls where (k / count) ^ growth of the run lies: 1 is even, above 1 closer at first.

    timesteps: of the calls, falling. With them, a run is halfway between its calls and its noise schedule: karras and
    beta spend most of their calls in noise, where little is decided. Without, or evenly spaced, it is its calls.
    """
    behind = [call / calls for call in range(calls)]
    if timesteps is not None and calls > 1 and timesteps[0] > timesteps[-1]:
        first, last = timesteps[0], timesteps[-1]
        end = min(last, last - min(timesteps[-2] - last, first / (calls - 1)))  # where one more call would lie
        gone = accumulate(((first - timestep) / (first - end) for timestep in timesteps), max)
        behind = [(share + noise) / 2 for share, noise in zip(behind, gone, strict=True)]
    places = [0]
    for k in range(1, count):
        wanted = (k / count) ** growth
        nearest = min(range(calls), key=lambda call: abs(behind[call] - wanted))
        places.append(min(max(places[-1] + 1, nearest), calls - count + k))
    return tuple(places)


def ruled(timesteps: Sequence[float], interval: int) -> Placement:
    """Where the compute calls of a run with these timesteps lie, as far as nothing is calibrated."""
    return Placement(
        warped(len(timesteps), budget(len(timesteps), interval), GROWTH, timesteps), len(timesteps), "not calibrated"
    )


def progress(timestep: float, num_train_timesteps: int = 1000) -> float:
    """How far the noise schedule has come at `timestep` (training timesteps): 0 pure noise, 1000 finished."""
    return WHOLE_SCHEDULE - timestep * WHOLE_SCHEDULE / num_train_timesteps


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the schedule, in progress units and both ends included, in which a call may reuse."""

    start: int = 0
    end: int = WHOLE_SCHEDULE

    @property
    def is_whole(self) -> bool:
        """Nothing is excluded, so that the timestep need not be read (from a GPU, that is a synchronisation)."""
        return self.start <= 0 and self.end >= WHOLE_SCHEDULE

    def contains(self, timestep: float, num_train_timesteps: int = 1000) -> bool:
        return self.start <= progress(timestep, num_train_timesteps) <= self.end


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every `interval`-th call computes; counted from the last computed call, whatever made that one compute.

    In an uninterrupted run these are the calls 0, N, 2N, …: ⌈calls / N⌉ of them.
    """

    interval: int

    def reuses(self, call: int, computed: int) -> bool:
        """Whether a call reuses, `computed` being the last one that did not; both counted from 0."""
        return call - computed < self.interval


@dataclass(frozen=True, slots=True)
class Placement:
    """The compute calls of a run of `calls` calls. A run that goes on longer goes on uniformly, as densely.

    source: where the places come from, a phrase for the report.
    """

    computed: tuple[int, ...]
    calls: float
    source: str

    def reuses(self, call: int, computed: int) -> bool:
        """Whether a call reuses, `computed` being the last one that did not; both counted from 0."""
        if call < self.calls:
            return call not in self.computed
        return (call - computed) * len(self.computed) < self.calls


PlacementRule = Callable[[float, int, int | None], Placement | None]
"""Timestep of the first call, interval and branch → the run's placement; None if its length is not known."""
