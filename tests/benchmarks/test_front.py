"""Pareto fronts, against comparisons of every pair, and what is read off them."""

from __future__ import annotations

import random

import pytest

from benchmarks.cache.front import at_speed, in_operations, in_time, shortened, unbeaten
from benchmarks.cache.measure import Result, difference


def point(method: str, speedup: float, psnr: float, label: str = "", hit_rate: float = 0.5) -> Result:
    return Result(method, label, psnr_db=[psnr, psnr], seconds=[1.0], uncached_seconds=[speedup],
                  operations_speedup=speedup, hit_rate=hit_rate)  # fmt: skip


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    rng = random.Random(0)
    points = [point("ours", rng.uniform(1, 4), rng.uniform(10, 50), str(i)) for i in range(40)]
    expected = [
        one for one in points
        if not any(in_time(o) >= in_time(one) and o.mean_psnr >= one.mean_psnr for o in points if o is not one)
    ]  # fmt: skip
    front = unbeaten(points, in_time)
    assert sorted(one.label for one in front) == sorted(one.label for one in expected)
    assert [in_time(one) for one in front] == sorted(in_time(one) for one in front)


def test_fewer_steps_at_equal_speed_lie_between_two_runs() -> None:
    runs = [
        Result("ours", "", psnr_db=[90.0, 90.0], operations_speedup=2.0),
        Result("fewer steps", "9", steps=9, psnr_db=[20.0, 30.0], operations_speedup=2.2),
        Result("fewer steps", "11", steps=11, psnr_db=[24.0, 50.0], operations_speedup=1.8),
        Result("fewer steps", "14", steps=14, psnr_db=[80.0, 80.0], operations_speedup=1.4),
    ]
    found = [shortened(runs, in_operations, speedup) for speedup in (1.3, 1.8, 1.9, 9.0)]
    assert [one and (one.label, one.psnr_db) for one in found] == [
        None,
        ("11", [24.0, 50.0]),
        ("11 to 9", [pytest.approx(23.0), pytest.approx(45.0)]),
        ("9", [20.0, 30.0]),
    ]


def test_a_front_is_read_between_its_points_and_not_beyond() -> None:
    front = [
        Result("peer", "a", psnr_db=[40.0, 50.0], lpips=[0.2, 0.1], operations_speedup=1.5),
        Result("peer", "b", psnr_db=[20.0, 30.0], lpips=[0.4, 0.3], operations_speedup=2.5),
    ]
    between = at_speed(front, in_operations, 2.0)
    assert between is not None
    assert (between.label, between.psnr_db, between.lpips) == ("a to b", [30.0, 40.0], pytest.approx([0.3, 0.2]))
    assert at_speed(front, in_operations, 2.5) == front[1]
    assert [at_speed(front, in_operations, speedup) for speedup in (1.4, 2.6)] == [None, None]


def test_a_difference_is_paired() -> None:
    """Pictures that are hard for both settings widen neither's lead."""
    hard = Result("a", "", psnr_db=[20.0, 40.0, 30.0])
    harder = Result("b", "", psnr_db=[18.0, 38.0, 28.0])
    assert difference(hard, harder) == (2.0, 2.0, 2.0)
