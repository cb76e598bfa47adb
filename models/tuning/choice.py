"""From a wished speed to steps and a strategy, by what a model's profile knows. Torch is not imported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cache import CacheStrategy, FittedForecast, NoCache
from models.base import CacheName
from models.sampling.samplers import DEFAULT_SAMPLER

from .front import Front, Point, nearest
from .profile import LENDERS, Profile

_FAULTS: Mapping[str | None, str] = {
    "damaged": "{model}'s profile is damaged and was left out.",
    "foreign": "{model}'s profile was made for other weights and was left out.",
}
_REMEDY = "`python -m app calibrate {model}` on the server makes one for it."


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for: `cache_speedup`, `cache_floor` (dB), and the uncached `steps` that it is measured by.

    sampler, scheduler: by name, None where they are left to the model.
    """

    speedup: float
    floor: float | None
    steps: int
    guidance_scale: float
    sampler: str | None
    scheduler: str | None


@dataclass(frozen=True, slots=True)
class Choice:
    """What is drawn. report: of what a wish became, JSON-ready. warnings: sentences on what was not quite as wished."""

    steps: int
    strategy: CacheStrategy
    report: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def choose(wish: Wish, model: str, cache: CacheName, profile: Profile) -> Choice:
    """For the model of that name, cache and profile."""
    names = _named(wish, profile.own)
    known = nearest(profile.fronts, *names, wish.steps)
    point = fastest = Point(steps=wish.steps, strategy=NoCache())
    if known is not None:
        if known.key != (*names, wish.steps):
            known = known.portable
        front = known.at(wish.steps, wish.guidance_scale)
        fastest = front.chosen(wish.speedup)
        point = fastest if profile.borrowed else front.chosen(wish.speedup, wish.floor)
    if isinstance(point.strategy, FittedForecast):
        otherwise = front.portable.chosen(wish.speedup, wish.floor).strategy
        point = replace(point, strategy=replace(point.strategy, otherwise=otherwise))
    if profile.borrowed:
        said = list(_of_lender(wish, model, cache))
    else:
        said = list(_of_profile(wish, model, names, known, point))
    report = {
        "asked_speedup": wish.speedup,
        "asked_steps": wish.steps,
        "floor_db": wish.floor,
        "steps": point.steps,
        "speedup": round(point.speedup, 2),
        "by": "operations" if point.seconds is None else "seconds",
        "psnr_db": None if profile.borrowed or math.isinf(point.psnr_db) else point.psnr_db,
        "psnr_interval": None if profile.borrowed else point.psnr_interval,
        "measured": None if known is None or profile.borrowed else _conditions(known),
    }
    return Choice(point.steps, point.strategy, report, (*said, *_of_speed(wish, model, point, fastest)))


def _named(wish: Wish, own: tuple[str, str] | None) -> tuple[str, str]:
    """The names by which a front is looked up, where a request leaves some to the model."""
    if wish.sampler is None and wish.scheduler is None and own is not None:
        return own
    return wish.sampler or DEFAULT_SAMPLER, wish.scheduler or "normal"


def _of_lender(wish: Wish, model: str, cache: CacheName) -> Iterator[str]:
    """What to say of a front that is another model's."""
    yield (
        f"{model} has no profile of its own: cache_speedup took what proved best on {LENDERS[cache]}, and its likeness "
        f"is not known. {_REMEDY.format(model=model)}"
    )
    if wish.floor is not None:
        yield "cache_floor had no effect: what another model reached says nothing of this one's likeness."


def _of_profile(wish: Wish, model: str, names: tuple[str, str], known: Front | None, point: Point) -> Iterator[str]:
    """What to say of a front that was measured under other conditions."""
    if known is None:
        return
    if known.key != (*names, wish.steps):
        yield f"{model}'s profile holds no {', '.join(names)}, {wish.steps} steps: that of {known} was taken."
    if point.strategy != NoCache() and point.seconds is None:
        yield (
            f"{model}'s profile has no seconds of this device, so that operations decided. "
            f"{_REMEDY.format(model=model)}"
        )


def _of_speed(wish: Wish, model: str, point: Point, fastest: Point) -> Iterator[str]:
    """What to say of a wish that is not fulfilled."""
    if point.reaches(wish.speedup):
        return
    if point != fastest:
        yield (
            f"cache_floor allows {point.speedup:.2f}× at most: cache_speedup {wish.speedup:g} would be at "
            f"{fastest.psnr_db:.1f} dB."
        )
    else:
        yield (
            f"cache_speedup {wish.speedup:g} is out of reach for {wish.steps} steps of {model}: the most, "
            f"{point.speedup:.2f}×, was taken."
        )


def _conditions(front: Front) -> str:
    told = f"{front}, guidance {front.guidance_scale:g}, {front.width}×{front.height}, {front.pictures} pictures"
    return told if front.device is None else f"{told}, {front.device}"


def faults(model: str, profile: Profile, strategy: CacheStrategy) -> list[str]:
    """What to say of a profile that could not be read, wherever a cache acts."""
    if profile.fault is None or strategy == NoCache():
        return []
    return [f"{_FAULTS[profile.fault]} {_REMEDY}".format(model=model)]
