"""What the caches are held to, measured: each a sentence, the figures, and whether it holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cache.front import Axis, at_least, in_operations, our_front, shortened
from benchmarks.cache.measure import Bench, Result, difference
from benchmarks.cache.settings import FEWER, OURS, OURS_FEWER, PLAIN_REUSE, PUBLISHED, UNCACHED, Setting
from benchmarks.report import Claim

GAINS = {2: 4.0, 3: 4.0, 5: 1.5}  # interval → dB that the default must gain over plain reuse
OVER_FEWER = 8.0  # dB over fewer steps in equal time
EXTRA_TIME = 0.02  # that a forecast may cost
OVERHEAD = 0.05  # of a reuse step's time that may be ours
HELD: dict[str, tuple[Axis, float, Sequence[str]]] = {
    "hit rate": (lambda one: one.hit_rate, 0.0, (OURS,)),
    "speed-up in operations": (in_operations, 1.0, (OURS, OURS_FEWER)),
}
"""What settings are matched by, its value for an uncached run, and which of ours count: a hit rate says nothing across
runs of unequal length."""


def of_intervals(results: Sequence[Result], branch: int) -> list[Claim]:
    """The default on a UNet, at `branch`, against plain reuse, the published helper, and fewer steps."""
    claims = []
    for interval, wanted in GAINS.items():
        here = {one.method: one for one in results if (one.interval, one.branch) == (interval, branch)}
        if (own := here.get(OURS)) is None:
            continue
        fewer = shortened(results, in_operations, own.operations_speedup)
        as_fast = f"{fewer and fewer.label} steps at {own.operations_speedup:.2f}× in operations"
        others = (
            ("plain reuse", here.get(PLAIN_REUSE), wanted),
            (PUBLISHED, here.get(PUBLISHED), 0.0),
            (as_fast, fewer, OVER_FEWER),
        )
        for name, other, least in others:
            if other is not None:
                mean, low, high = difference(own, other)
                sentence = f"interval {interval}, branch {branch}: the default over {name}, at least {least:g} dB"
                measured = f"{mean:+.1f} dB [{low:+.1f}, {high:+.1f}]"
                claims.append(Claim(sentence, measured, mean >= least and low > 0))
    return claims


def forecast_time(bench: Bench, forecast: Setting, plain: Setting, repeats: int) -> Claim:
    """The forecast's own cost in time, by runs of the two side by side."""
    excess = statistics.median(own / base - 1 for own, base in bench.paired(forecast, plain, repeats)[0])
    sentence = f"{forecast.name}: time over plain reuse, at most {EXTRA_TIME:.0%}"
    return Claim(sentence, f"{excess:+.1%}, median of {repeats} pairs", excess <= EXTRA_TIME)


def of_overheads(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What the default's reuse step takes above its bare layers, and against the published helper's."""
    claims = []
    for row in rows:
        own, published = row["excess"][OURS], row["excess"][PUBLISHED]
        sentence = f"branch {row['branch']}: a reuse step above its bare layers, at most {OVERHEAD:.0%} and below the "
        measured = f"{own:+.1%} of {row['milliseconds']:.2f} ms against {published:+.1%}"
        claims.append(Claim(f"{sentence}published helper's", measured, own <= OVERHEAD and own < published))
    return claims


def of_thresholds(results: Sequence[Result]) -> list[Claim]:
    """The default on a transformer, against every peer at no lower hit rate and at no fewer operations saved."""
    claims = []
    for method in dict.fromkeys(one.method for one in results if not one.ours and one.method != UNCACHED):
        for unit, (axis, neutral, counted) in HELD.items():
            if method == FEWER and unit == "hit rate":
                continue  # its calls are all whole ones
            front = our_front([one for one in results if one.method in counted], axis)
            points = [one for one in results if one.method == method and axis(one) > neutral]
            couples = [(one, at_least(front, axis, axis(one))) for one in points]
            claims.append(_against(f"the default: nearer than {method} at no lower {unit}", couples))
    return claims


def _against(sentence: str, couples: Sequence[tuple[Result, Result | None]]) -> Claim:
    gains = [(difference(own, peer), own, peer) for peer, own in couples if own is not None]
    if not gains:
        return Claim(sentence, f"none of its {len(couples)} points has one of ours to be held against")
    won = sum(mean > 0 for (mean, _, _), _, _ in gains)
    (mean, low, high), own, peer = min(gains, key=lambda entry: entry[0][0])
    measured = (
        f"{won} of {len(gains)} points ({len(couples) - len(gains)} without a counterpart); the worst "
        f"{mean:+.1f} dB [{low:+.1f}, {high:+.1f}], {own.label} against {peer.label}"
    )
    return Claim(sentence, measured, won == len(gains))
