"""A model's front, by successive halving: many settings draw few pictures, those that come nearest draw more.

In each round the settings that are left draw the same pictures, of which the uncached ones are known. After some rounds
a setting falls behind by what another one, as fast by operations or faster, is nearer; the half that falls behind least
goes on, and whatever nothing beats. (Karnin et al. 2013, "Almost optimal exploration in multi-armed bandits"; here the
arms are ranked against a front instead of one best.) What remains is timed, each run beside an uncached one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cache import CacheReport, CacheStrategy, DeepCache, FirstBlockCache, NoCache, UNetDenoiser
from cache.deepcache import DEEPEST
from cache.deepcache.schedule import budget
from cache.flops import deepest_branch
from models.base import GenerationParams

from .front import FEWEST, Point
from .nearness import psnr
from .unfinished import Unfinished

if TYPE_CHECKING:
    from models.generation import LoadedModel

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)  # of the front's steps
INTERVALS = (2, 3, 4, 5)
LEAST = 4  # computed calls: with fewer, a forecast and what repays it never lay above fewer steps without a cache
DEPTHS = (0, 1, 2, 3, 4, DEEPEST)
THRESHOLDS = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
RUNGS = (1, 2, 4, 8)  # rounds after which a half is left behind
FASTEST = 8.0  # by operations: in seconds a little less, which covers what may be asked for
PAIRS = 5  # of timed runs for each point
CONFIDENT = 1.96  # standard errors: 95 %


class OutOfTime(Exception):
    """Raised by a `tick` to end a search; what was found by then counts."""


@dataclass(frozen=True, slots=True)
class Candidate:
    steps: int
    strategy: CacheStrategy

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.strategy}"


def candidates(denoiser: Any, steps: int, *, guided: bool) -> list[Candidate]:
    """What is tried for pictures of so many steps. guided: whether both halves of guidance run in one call."""
    counts = list(dict.fromkeys(max(FEWEST, round(steps * share)) for share in SHARES))
    strategies: list[CacheStrategy] = [NoCache()]
    if isinstance(denoiser, UNetDenoiser):
        depths: dict[int | None, int] = {}  # the first that chooses each branch: equal branches are equal settings
        for depth in DEPTHS:
            depths.setdefault(deepest_branch(denoiser.branch_costs, depth), depth)
        for interval, (branch, depth) in product(INTERVALS, depths.items()):
            strategies.append(DeepCache(interval, depth))
            if guided and branch is not None:
                strategies.append(DeepCache(interval, depth, guidance="reuse"))
    else:
        strategies += [FirstBlockCache(threshold) for threshold in THRESHOLDS]
    return [
        Candidate(count, strategy)
        for count, strategy in product(counts, strategies)
        if (count, strategy) != (steps, NoCache())
        and not (isinstance(strategy, DeepCache) and budget(count, strategy.interval) < LEAST)
    ]


@dataclass
class Tried:
    """What a candidate gave so far: PSNR of each picture in dB, and its cost, in whole calls a picture, a round."""

    psnr_db: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)


@dataclass
class Pictures:
    """What a search draws: one prompt a round, in turn, with a seed for each picture of a round.

    tick: told before each drawing what it is for; it may raise OutOfTime, or whatever ends the search.
    """

    model: LoadedModel
    params: GenerationParams  # of the uncached pictures; its seeds are those of the first rounds
    prompts: Sequence[str]
    kept: Unfinished
    tick: Callable[[str], None]
    references: dict[int, list[ArrayLike]] = field(default_factory=dict)

    def tried(self, candidate: Candidate, number: int) -> Tried:
        """One round of a candidate; not drawn again if an interrupted search did."""

        def draw() -> list[Any]:
            reference = self.reference(number)
            pictures, calls = self._drawn(candidate, number)
            return [[psnr(*pair) for pair in zip(reference, pictures, strict=True)], calls]

        nearness, calls = self.kept.known(f"{self.about}, {candidate!r}, round {number}", draw)
        return Tried(nearness, [calls])

    def reference(self, number: int) -> list[ArrayLike]:
        if number not in self.references:
            self.references[number], _ = self._drawn(self.uncached, number)
        return self.references[number]

    def uncached_calls(self) -> float:
        """Of one picture."""
        calls: float = self.kept.known(f"{self.about}, calls", lambda: self._drawn(self.uncached, 0)[1])
        return calls

    @property
    def uncached(self) -> Candidate:
        return Candidate(self.params.steps, NoCache())

    @property
    def about(self) -> str:
        one = self.params
        return (
            f"{one.sampler}, {one.scheduler}, {one.steps} steps, {one.width}×{one.height}, guidance "
            f"{one.guidance_scale}, seeds {one.seeds}, prompts {'|'.join(self.prompts)}"
        )

    def round(self, number: int) -> GenerationParams:
        """Of the uncached pictures of a round."""
        turn, place = divmod(number, len(self.prompts))
        seeds = tuple(seed + turn * len(self.params.seeds) for seed in self.params.seeds)
        return replace(self.params, prompt=self.prompts[place], seeds=seeds)

    def _drawn(self, candidate: Candidate, number: int) -> tuple[list[ArrayLike], float]:
        """The pictures of a round, and what they cost in whole calls, each."""
        self.tick(f"{candidate}, round {number + 1}")
        params = replace(self.round(number), steps=candidate.steps)
        drawn = self.model.generate(params, candidate.strategy, lambda step: None)
        return [np.asarray(image) for image in drawn.images], statistics.mean(map(_cost, drawn.reports))

    def seconds(self, candidate: Candidate) -> float:
        """How many times faster one picture is denoised than the uncached one: the median over pairs of runs."""

        def paired() -> float:
            self.tick(f"{candidate}, timed")
            ratios = []
            for number in range(PAIRS):
                pair = (self.uncached, candidate) if number % 2 else (candidate, self.uncached)
                taken = {one: self._timed(one, number) for one in pair}
                ratios.append(taken[self.uncached] / taken[candidate])
            return statistics.median(ratios)

        taken: float = self.kept.known(f"{self.about}, {candidate!r}, timed", paired)
        return taken

    def _timed(self, candidate: Candidate, number: int) -> float:
        params = self.round(number)
        one = replace(params, steps=candidate.steps, seeds=params.seeds[:1], batch_size=1)
        return self.model.generate(one, candidate.strategy, lambda step: None).timings.denoise_seconds


def _cost(report: CacheReport) -> float:
    """Of a run, in whole calls; a reused call whose operations were not counted is taken for a whole one."""
    lines = report.item_decisions or [report.decisions]
    reuse = 1.0 if report.reuse_cost is None else report.reuse_cost
    return statistics.mean(line.count("C") + line.count("R") * reuse for line in lines)


def fronts(
    pictures: Pictures, tried: Sequence[Candidate], rungs: Sequence[int] = RUNGS
) -> Iterator[tuple[list[Point], int]]:
    """The points that nothing tried beats in both operations and likeness, slowest first, and by how many pictures.

    Surer ones after each rung; the last ones have their seconds.
    """
    left: Sequence[Candidate] = tried
    points: list[Point] = []
    drawn = 0
    calls = pictures.uncached_calls()
    for rung in rungs:
        measured = {candidate: _together(pictures.tried(candidate, n) for n in range(rung)) for candidate in left}
        found = {candidate: _point(candidate, one, calls) for candidate, one in measured.items()}
        points, drawn = unbeaten(list(found.values())), rung * len(pictures.params.seeds)
        yield points, drawn
        left = kept_on(found)
    seconds = [pictures.seconds(Candidate(point.steps, point.strategy)) for point in points]
    yield [replace(point, seconds=round(one, 3)) for point, one in zip(points, seconds, strict=True)], drawn


def drawings(count: int, rungs: Sequence[int] = RUNGS) -> int:
    """About how many times `fronts` draws for so many candidates."""
    total, done, left = rungs[-1], 0, count
    for rung in rungs:
        total, done, left = total + left * (rung - done), rung, left // 2
    return total + left


def _together(rounds: Iterable[Tried]) -> Tried:
    whole = Tried()
    for one in rounds:
        whole = Tried([*whole.psnr_db, *one.psnr_db], [*whole.calls, *one.calls])
    return whole


def _point(candidate: Candidate, measured: Tried, calls: float) -> Point:
    nearness = measured.psnr_db
    mean = statistics.mean(nearness)
    half = CONFIDENT * statistics.stdev(nearness) / math.sqrt(len(nearness)) if len(nearness) > 1 else math.inf
    return Point(
        steps=candidate.steps,
        strategy=candidate.strategy,
        operations=round(calls / statistics.mean(measured.calls), 3),
        psnr_db=round(mean, 2),
        psnr_interval=(round(mean - half, 2), round(mean + half, 2)),
    )


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """Those that no other is at least as fast as and nearer, by operations; slowest first, of equals the first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (one.operations, one.psnr_db), reverse=True):
        if not front or point.psnr_db > front[-1].psnr_db:
            front.append(point)
    return [point for point in reversed(front) if 1 < point.operations <= FASTEST]


def kept_on(points: Mapping[Candidate, Point]) -> list[Candidate]:
    """The half that falls least behind the nearest point of at least its speed, and all that fall behind none."""
    behind = {
        candidate: max(other.psnr_db for other in points.values() if other.operations >= point.operations)
        - point.psnr_db
        for candidate, point in points.items()
        if 1 < point.operations <= FASTEST
    }
    ranked = sorted(behind, key=lambda candidate: behind[candidate])
    best = set(ranked[: max(1, len(points) // 2)])
    return [candidate for candidate in behind if candidate in best or behind[candidate] == 0]
