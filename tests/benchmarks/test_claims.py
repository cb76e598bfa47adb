"""Verdicts on figures made up so that each of them is known."""

from __future__ import annotations

from typing import Any

from benchmarks.cache.claims import of_intervals, of_overheads, of_thresholds
from benchmarks.cache.measure import Result
from benchmarks.cache.settings import OURS, OURS_FEWER, PLAIN_REUSE, PUBLISHED


def result(method: str, psnr: float, speedup: float = 2.0, **fields: Any) -> Result:
    return Result(method, fields.pop("label", ""), psnr_db=[psnr - 1, psnr + 1], seconds=[1.0],
                  uncached_seconds=[speedup], operations_speedup=speedup, **{"hit_rate": 0.5} | fields)  # fmt: skip


def test_a_forecast_is_held_against_plain_reuse_the_helper_and_fewer_steps() -> None:
    def unet(plain: float) -> list[Result]:
        where = {"interval": 3, "branch": 0}
        return [
            result(OURS, 40, **where),
            result(PLAIN_REUSE, plain, **where),
            result(PUBLISHED, plain, **where),
            result(OURS, 90, interval=3, branch=1),  # another branch
            result(f"{OURS}, guidance reused, fewer steps", 90, 3.0, steps=10, **where),  # of another run
            result("fewer steps", 34, 1.9, label="10", steps=10),
            result("fewer steps", 32, 2.1, label="9", steps=9),
        ]

    clear = of_intervals(unet(35), 0)
    assert [claim.holds for claim in clear] == [True, True, False]
    assert clear[0].measured == "+5.0 dB [+5.0, +5.0]"
    assert "over 10 to 9 steps at 2.00× in operations, at least 8 dB" in clear[2].sentence
    small = of_intervals(unet(37), 0)
    assert [claim.holds for claim in small] == [False, True, False]  # 3 dB where 4 were asked for


def test_the_default_is_held_to_beating_the_peers() -> None:
    results = [
        result("uncached", 96, 1.0),
        result(OURS, 40, 2.0, hit_rate=0.6, label="a"),
        result(OURS, 30, 3.0, hit_rate=0.8, label="b"),
        result(PLAIN_REUSE, 99, 3.0, hit_rate=0.8),  # not the default
        result("peer", 35, 1.5, hit_rate=0.5),
        result("peer", 31, 2.5, hit_rate=0.7, label="strong"),
        result("peer", 5, 9.0, hit_rate=0.9),
        result("peer", 96, 1.0, hit_rate=0.0),  # did not act
    ]
    claims = of_thresholds(results)
    assert [claim.holds for claim in claims] == [False, False]
    assert claims[0].measured.startswith("1 of 2 points (1 without a counterpart); the worst -1.0 dB")
    assert claims[0].measured.endswith("b against strong")


def test_a_shortened_run_of_ours_counts_by_operations_and_not_by_hit_rate() -> None:
    results = [
        result("uncached", 96, 1.0, steps=28),
        result(OURS, 40, 2.0, hit_rate=0.6, steps=28),
        result(OURS_FEWER, 45, 3.0, hit_rate=0.7, steps=20),
        result(OURS_FEWER, 30, 2.6, hit_rate=0.7, steps=20),  # beaten by the above
        result("peer", 42, 2.5, hit_rate=0.6, steps=28),
    ]
    by_hit_rate, by_operations = of_thresholds(results)
    assert by_hit_rate.measured.startswith("0 of 1 points (0 without a counterpart); the worst -2.0 dB")
    assert by_operations.measured.startswith("1 of 1 points (0 without a counterpart); the worst +3.0 dB")


def test_the_overhead_must_be_small_and_below_the_helpers() -> None:
    rows = [
        {"branch": branch, "milliseconds": 5.0, "excess": {OURS: own, PUBLISHED: published}}
        for branch, (own, published) in enumerate([(0.03, 0.1), (0.03, 0.02), (0.06, 0.1)])
    ]
    assert [claim.holds for claim in of_overheads(rows)] == [True, False, False]
