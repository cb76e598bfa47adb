"""Which point of a front a wish gets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cache import CacheStrategy, DeepCache, NoCache
from models.tuning.front import Front, Point, nearest

HALF = DeepCache(2, 1, guidance="reuse")


def point(steps: int, operations: float, psnr_db: float, strategy: CacheStrategy | None = None) -> Point:
    return Point(
        steps=steps, strategy=strategy or DeepCache(), operations=operations, psnr_db=psnr_db, psnr_interval=(0, 99)
    )


FRONT = Front(
    sampler="euler",
    scheduler="normal",
    steps=20,
    guidance_scale=3.0,
    width=64,
    height=64,
    pictures=8,
    device=None,
    points=(point(20, 1.5, 50), point(20, 2.5, 45), point(12, 3.0, 40, HALF), point(5, 4.0, 30, NoCache())),
)


@pytest.mark.parametrize(
    ("speedup", "floor", "steps", "speed"),
    [
        (1, None, 20, 1),  # the uncached picture itself
        (1.2, None, 20, 1.5),
        (1.5, None, 20, 1.5),
        (1.57, None, 20, 1.5),  # 95 % of it
        (1.6, None, 20, 2.5),  # nothing is interpolated
        (2.7, None, 12, 3.0),
        (4, None, 5, 4.0),
        (6, None, 5, 4.0),  # out of reach: the fastest
        (4, 40, 12, 3.0),  # the fastest above the floor
        (4, 41, 20, 2.5),
        (2, 41, 20, 2.5),
        (4, 51, 20, 1),
        (1.2, 20, 20, 1.5),  # a floor asks for nothing faster
    ],
)
def test_the_nearest_point_that_is_fast_enough(speedup: float, floor: float | None, steps: int, speed: float) -> None:
    found = FRONT.chosen(speedup, floor)
    assert (found.steps, found.speedup) == (steps, speed)


def test_seconds_decide_where_they_are_known() -> None:
    """The second point saves most operations and is no faster than the first."""
    timed = [replace(one, seconds=speed) for one, speed in zip(FRONT.points, (1.4, 1.4, 3.5, 4.4), strict=True)]
    front = replace(FRONT, points=tuple(timed))
    assert front.chosen(1.3).psnr_db == 50
    assert front.chosen(1.5).psnr_db == 50  # seconds waver
    assert front.chosen(1.53).psnr_db == 50
    assert front.chosen(1.55).psnr_db == 40
    assert front.chosen(2).steps == 12


def test_in_another_number_of_steps_a_point_has_its_share() -> None:
    longer = FRONT.at(50, 3.0)
    assert [one.steps for one in longer.points] == [50, 50, 30, 12]
    assert longer.points[3].operations == pytest.approx(4.0 * 12.5 / 12)
    assert longer.points[0] == replace(FRONT.points[0], steps=50)
    assert longer.steps == 50


@pytest.mark.parametrize(("steps", "left"), [(4, [4, 4, 2, 2]), (3, [3, 3, 2, 2]), (2, [2, 2, 2]), (1, [])])
def test_a_short_run_keeps_what_two_steps_can_do(steps: int, left: list[int]) -> None:
    """Of two steps the one without a cache is the run itself."""
    assert [one.steps for one in FRONT.at(steps, 3.0).points] == left
    assert FRONT.at(steps, 3.0).chosen(6).steps == min([*left, steps])


@pytest.mark.parametrize(("guidance_scale", "reused"), [(3.0, 1), (1.5, 1), (1.0, 0), (7.5, 0)])
def test_guidance_is_reused_where_it_was_measured(guidance_scale: float, reused: int) -> None:
    points = FRONT.at(20, guidance_scale).points
    assert sum(one.strategy == HALF for one in points) == reused
    assert len(points) == 3 + reused


def test_the_nearest_front_has_the_sampler_then_the_schedule_then_the_steps() -> None:
    fronts = [replace(FRONT, steps=50), FRONT, replace(FRONT, scheduler="karras"), replace(FRONT, sampler="ddim")]
    assert nearest(fronts, "euler", "normal", 30) == FRONT  # a ratio of 1.5 against 1.67
    assert nearest(fronts, "euler", "karras", 50) == fronts[2]
    assert nearest(fronts, "euler", "beta", 50) == fronts[0]
    assert nearest(fronts, "unipc", "normal", 20) in (FRONT, fronts[3])
    assert nearest([], "euler", "normal", 20) is None


@pytest.mark.parametrize("change", [{"steps": 0}, {"operations": math.nan}, {"psnr_db": -1.0}, {"seconds": 0.0}])
def test_a_point_of_nothing_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        replace(FRONT.points[0], **change)  # type: ignore[arg-type]
