"""Calibrated placements of DeepCache's compute calls, which a model's profile holds, and what a run takes from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cache.deepcache.schedule import Placement, budget, ruled


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What was found for one sampler, noise schedule, number of steps, interval and branch.

    `calls` calls of the denoiser, of which the `computed` ones compute; `gain_db` is what that gave over the uniform
    placement, in PSNR to the uncached pictures, in the mean over so many `pictures`.
    """

    sampler: str
    scheduler: str
    steps: int
    interval: int
    branch: int | None
    calls: int
    computed: tuple[int, ...]
    gain_db: float
    pictures: int

    def __post_init__(self) -> None:
        fits = len(self.computed) == budget(self.calls, self.interval) and self.computed[0] == 0
        if not fits or list(self.computed) != sorted(set(self.computed)) or self.computed[-1] >= self.calls:
            raise ValueError(
                f"{self.computed} are not {budget(self.calls, self.interval)} of {self.calls} calls from 0 on"
            )

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.sampler, self.scheduler, self.steps, self.interval, -1 if self.branch is None else self.branch)


def place(
    known: Iterable[Calibrated],
    sampler: str,
    scheduler: str,
    timesteps: Sequence[float],
    interval: int,
    branch: int | None,
) -> Placement:
    """The calibrated compute calls; else those of the nearest length, stretched; else a rule's.

    timesteps: of the run's calls.
    """
    calls = len(timesteps)
    alike = [one for one in known if (one.sampler, one.scheduler, one.interval) == (sampler, scheduler, interval)]
    if not alike:
        return ruled(timesteps, interval)
    nearest = min(alike, key=lambda one: (abs(math.log(one.calls / calls)), one.branch != branch))
    found = f"{sampler}, {scheduler}, {nearest.steps} steps"
    if nearest.calls == calls:
        return Placement(nearest.computed, calls, f"calibrated: {found}")
    return Placement(stretched(nearest.computed, nearest.calls, calls, interval), calls, f"stretched from {found}")


def stretched(computed: Sequence[int], calls: int, other: int, interval: int) -> tuple[int, ...]:
    """The same placement in a run of `other` calls instead of `calls`: the k-th of K at the same share of both.

    An even one stays even: where calls are no multiple of the interval, its last gap is short by chance.
    """
    if tuple(computed) == tuple(range(0, calls, interval)):
        return tuple(range(0, other, interval))
    knots, count = [*computed, calls], budget(other, interval)
    places = [0]
    for k in range(1, count):
        at = k / count * len(computed)
        below = int(at)
        share = (knots[below] + (at - below) * (knots[below + 1] - knots[below])) / calls
        places.append(min(max(places[-1] + 1, round(share * other)), other - count + k))
    return tuple(places)
