"""What the caches are held to, measured: each a sentence, the figures, and whether it holds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cache.front import Axis, at_least, in_operations, in_time, shortened
from benchmarks.cache.measure import Bench, Result, difference
from benchmarks.cache.settings import FEWER, UNCACHED, Setting

GAINS = {2: 4.0, 3: 4.0, 5: 1.5}  # interval → dB that the default forecast must gain over plain reuse
OVER_FEWER = 8.0  # dB over fewer steps in equal time
EXTRA_TIME = 0.02  # that a forecast may cost
OVERHEAD = 0.05  # of a reuse step's time that may be ours
PEER = "the published helper's"


def _hit_rate(result: Result) -> float:
    return result.hit_rate


UNITS: dict[str, tuple[Axis, float]] = {"hit rate": (_hit_rate, 0.0), "speed-up in operations": (in_operations, 1.0)}
"""What settings are matched by, with its value for an uncached run."""


@dataclass(frozen=True, slots=True)
class Claim:
    """`holds` is None for a figure that nothing was demanded of."""

    sentence: str
    measured: str
    holds: bool | None = None


def gain(ours: Result, other: Result) -> tuple[str, float, float]:
    """The mean difference in PSNR with its interval, as text, and the mean and the lower end as numbers."""
    mean, low, high = difference(ours, other)
    return f"{mean:+.1f} dB [{low:+.1f}, {high:+.1f}]", mean, low


def of_intervals(results: Sequence[Result], default: str, branch: int) -> list[Claim]:
    """The default forecast on a UNet, at `branch`: against plain reuse, the published helper, and fewer steps."""
    claims = []
    ours = [one for one in results if one.ours and one.branch == branch]
    peers = [one for one in results if not one.ours and one.branch == branch]
    for interval, wanted in GAINS.items():
        own = [one for one in ours if one.interval == interval]
        forecast = next((one for one in own if one.forecast == default), None)
        plain = next((one for one in own if one.forecast == "none"), None)
        if forecast is None:
            continue
        where = f"interval {interval}, branch {branch}"
        if plain is not None and plain is not forecast:
            text, mean, low = gain(forecast, plain)
            sentence = f"{where}: {default} forecast over plain reuse, at least {wanted} dB"
            claims.append(Claim(sentence, text, mean >= wanted and low > 0))
        for peer in (one for one in peers if one.interval == interval):
            text, _, low = gain(forecast, peer)
            claims.append(Claim(f"{where}: {default} forecast over {peer.method}", text, low > 0))
        if (fewer := shortened(results, in_time, forecast.speedup)) is not None:
            text, mean, _ = gain(forecast, fewer)
            sentence = (
                f"{where}: {forecast.speedup:.2f}× in time, over {fewer.steps} steps ({fewer.speedup:.2f}×), "
                f"at least {OVER_FEWER:.0f} dB"
            )
            claims.append(Claim(sentence, text, mean >= OVER_FEWER))
    return claims


def forecast_time(bench: Bench, forecast: Setting, plain: Setting, repeats: int) -> Claim:
    """The forecast's own cost in time, by runs of the two side by side."""
    excess = statistics.median(own / base - 1 for own, base in bench.paired(forecast, plain, repeats))
    sentence = f"{forecast.name}: time over plain reuse, at most {EXTRA_TIME:.0%}"
    return Claim(sentence, f"{excess:+.1%}, median of {repeats} pairs", excess <= EXTRA_TIME)


def of_overheads(rows: Sequence[Mapping[str, Any]], default: str) -> list[Claim]:
    """What the default forecast's reuse step takes above its bare layers, and against the published helper's."""
    claims = []
    for row in rows:
        own = row["excess"][f"ours, {default}"]
        (published,) = (excess for name, excess in row["excess"].items() if not name.startswith("ours"))
        sentence = f"{row['layers']}: a reuse step above its bare layers, at most {OVERHEAD:.0%} and below {PEER}"
        claims.append(Claim(sentence, f"{own:+.1%} against {published:+.1%}", own <= OVERHEAD and own < published))
    return claims


def of_thresholds(results: Sequence[Result], default: str) -> list[Claim]:
    """Each forecast on a transformer, against every peer at no lower hit rate and at no fewer operations saved.

    Only the default one is held to it.
    """
    claims = []
    peers = [name for name in dict.fromkeys(one.method for one in results if not one.ours) if name != UNCACHED]
    forecasts = dict.fromkeys(one.forecast for one in results if one.forecast is not None)
    for forecast in sorted(forecasts, key=lambda name: name != default):
        ours = [one for one in results if one.ours and one.forecast == forecast]
        named = f"{forecast} forecast{', the default' if forecast == default else ''}"
        for method in peers:
            points = [one for one in results if one.method == method]
            for unit, (axis, neutral) in UNITS.items():
                if method == FEWER and unit == "hit rate":
                    continue  # its calls are all whole ones
                couples = [(one, at_least(ours, axis, axis(one))) for one in points if axis(one) > neutral]
                claim = _against(f"{named}: nearer than {method} at no lower {unit}", couples)
                claims.append(claim if forecast == default else dataclasses.replace(claim, holds=None))
    return claims


def _against(sentence: str, couples: list[tuple[Result, Result | None]]) -> Claim:
    matched = [(peer, own) for peer, own in couples if own is not None]
    if not matched:
        return Claim(sentence, f"none of its {len(couples)} points has one of ours to be held against")
    gains = [(difference(own, peer), peer, own) for peer, own in matched]
    won = sum(mean > 0 for (mean, _, _), _, _ in gains)
    (mean, low, high), peer, own = min(gains, key=lambda entry: entry[0][0])
    measured = (
        f"{won} of {len(matched)} points ({len(couples) - len(matched)} without a counterpart); the worst "
        f"{mean:+.1f} dB [{low:+.1f}, {high:+.1f}], {own.label} against {peer.label}"
    )
    return Claim(sentence, measured, won == len(matched))
