"""What a model can do at which speed: settings that nothing measured beats in both speed and likeness.

A front is measured for one sampler, noise schedule and number of steps (`models/tuning/halving.py`). A request for a
speed-up takes one of its points as it is; nothing is interpolated. Torch is not imported: requests are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from cache import CacheStrategy, DeepCache, FirstBlockCache, FittedForecast, NoCache

STRATEGIES: Mapping[str, Any] = {kind.name: kind for kind in (NoCache, DeepCache, FirstBlockCache, FittedForecast)}
# Of a wish: a tenth less than asked is as asked. Seconds waver by a percent or two; operations leave out the sampler's
# own time. docs/decisions/profiles.md.
ENOUGH_SECONDS = 0.91
ENOUGH_OPERATIONS = 0.95
FEWEST = 2  # steps of a point: passes that draw a part of the schedule anew have nothing to do with one


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Settings, and what they gave beside the uncached pictures of the front's number of steps.

    operations, seconds: how many times fewer of the denoising; seconds is None where they were not taken on this
    device. psnr_db: mean over pictures, with its 95 % interval; infinite for the uncached pictures themselves.
    """

    steps: int
    strategy: CacheStrategy
    operations: float = 1.0
    seconds: float | None = None
    psnr_db: float = math.inf
    psnr_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        numbers = (self.steps, self.operations, self.psnr_db, 1.0 if self.seconds is None else self.seconds)
        if not all(number > 0 for number in numbers):  # false for NaN as well
            raise ValueError(f"a point's steps, speed-ups and likeness are above 0, not {numbers}")

    @property
    def speedup(self) -> float:
        return self.operations if self.seconds is None else self.seconds

    def reaches(self, speedup: float) -> bool:
        """Whether it is so fast, as nearly as seconds can say."""
        if self.seconds is None:
            return self.operations >= ENOUGH_OPERATIONS * speedup
        return self.seconds >= ENOUGH_SECONDS * speedup

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "cache": self.strategy.name,
            "settings": _told(self.strategy),
            **{name: getattr(self, name) for name in ("operations", "seconds", "psnr_db", "psnr_interval")},
        }

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Point:
        """Of what `as_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        row = dict(row)
        told = {name: _tuples(value) for name, value in row.pop("settings").items()}
        strategy = STRATEGIES[row.pop("cache")](**told)
        low, high = row.pop("psnr_interval")
        return cls(strategy=strategy, psnr_interval=(low, high), **row)


def _told(strategy: Any) -> dict[str, Any]:
    """Those of its settings that are not the default."""
    return {
        one.name: getattr(strategy, one.name)
        for one in fields(strategy)
        if one.default is MISSING or getattr(strategy, one.name) != one.default
    }


def _tuples(value: Any) -> Any:
    """JSON's lists as settings have them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The points of one sampler, noise schedule and number of steps, slowest first, and what they were measured on.

    device: the name of what the seconds were taken on; None where there are none, or a front is not this model's own.
    """

    sampler: str
    scheduler: str
    steps: int
    guidance_scale: float
    width: int
    height: int
    pictures: int
    device: str | None
    points: tuple[Point, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.sampler, self.scheduler, self.steps)

    def __str__(self) -> str:
        return f"{self.sampler}, {self.scheduler}, {self.steps} steps"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(replace(self, points=())), "points": [point.as_dict() for point in self.points]}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Front:
        """As `Point.of`."""
        return cls(**{**row, "points": tuple(map(Point.of, row["points"]))})

    def seen_from(self, device: str) -> Front:
        """Without its seconds, if another device took them."""
        if self.device == device:
            return self
        return replace(self, points=tuple(replace(point, seconds=None) for point in self.points))

    @property
    def portable(self) -> Front:
        """Without the points that hold for this model, sampler, noise schedule and number of steps alone."""
        points = tuple(point for point in self.points if not isinstance(point.strategy, FittedForecast))
        return replace(self, points=points)

    def at(self, steps: int, guidance_scale: float) -> Front:
        """For a run of `steps` steps: each point has its share of them, rounded down.

        Points that reuse guidance are left out where there is none, and above the scale that they were measured at,
        where they lose (docs/decisions/beyond-plain-reuse.md); above it fitted ones too (docs/decisions/fitted.md).
        """
        points = []
        for point in self.points:
            own = max(FEWEST, point.steps * steps // self.steps)
            gain = point.steps * steps / (self.steps * own)  # by the rounding
            if own > steps or (own == steps and isinstance(point.strategy, NoCache)):
                continue
            if isinstance(point.strategy, FittedForecast) and guidance_scale > self.guidance_scale:
                continue
            if getattr(point.strategy, "guidance", "full") == "reuse" and not 1 < guidance_scale <= self.guidance_scale:
                continue
            seconds = None if point.seconds is None else point.seconds * gain
            points.append(replace(point, steps=own, operations=point.operations * gain, seconds=seconds))
        return replace(self, steps=steps, points=tuple(points))

    def chosen(self, speedup: float, floor: float | None = None) -> Point:
        """The point nearest to the uncached pictures among those that reach the speed; the fastest one if none does.

        floor: dB; of the points that are not farther than that, the fastest, should the choice be farther.
        """
        points = (Point(steps=self.steps, strategy=NoCache()), *self.points)
        fast = [point for point in points if point.reaches(speedup)]
        best = max(fast, key=lambda point: point.psnr_db) if fast else max(points, key=lambda point: point.speedup)
        if floor is None or best.psnr_db >= floor:
            return best
        return max((point for point in points if point.psnr_db >= floor), key=lambda point: point.speedup)


def nearest(fronts: Iterable[Front], sampler: str, scheduler: str, steps: int) -> Front | None:
    """The one of this sampler and noise schedule, else of this sampler, else any; of those the nearest in steps."""
    return min(
        fronts,
        key=lambda one: (
            one.sampler != sampler,
            one.scheduler != scheduler,
            abs(math.log(one.steps / steps)),
        ),
        default=None,
    )
