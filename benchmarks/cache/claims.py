"""What the caches are held to, measured: each a sentence, the figures, and whether it holds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.cache.front import Axis, at_least, in_operations, our_front, shortened
from benchmarks.cache.measure import Bench, Result, difference
from benchmarks.cache.settings import FEWER, NO_LAYER, OURS, UNCACHED, Setting, named
from benchmarks.report import Claim
from cache import UNetDenoiser
from cache.flops import deepest_branch, interval_speedup

GAINS = {2: 4.0, 3: 4.0, 5: 1.5}  # interval → dB that the default forecast must gain over plain reuse
OVER_FEWER = 8.0  # dB over fewer steps in equal time
EXTRA_TIME = 0.02  # that a forecast may cost
OVERHEAD = 0.05  # of a reuse step's time that may be ours
PRESETS = {"balanced": (3, 2, 2.0), "max_speed": (5, 3, 2.78), "max_quality": (2, 1, 1.5)}
"""Interval, depth, and the speed-up that it is to reach at least."""
SD15 = {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}  # the rest is the class's default
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNITS: dict[str, tuple[Axis, float]] = {
    "hit rate": (lambda one: one.hit_rate, 0.0),
    "speed-up in operations": (in_operations, 1.0),
}
"""What settings are matched by, with its value for an uncached run."""


def of_intervals(results: Sequence[Result], branch: int) -> list[Claim]:
    """The default on a UNet, at `branch`, against plain reuse, the published helper, and fewer steps.

    What else of ours has the interval is held against fewer steps too, without a demand.
    """
    claims = []
    whole = [one for one in results if one.steps == results[0].steps]

    def claim(sentence: str, own: Result, other: Result, least: float | None) -> None:
        """`least`: dB that the gain must have, its interval above 0; None: no demand."""
        mean, low, high = difference(own, other)
        measured = f"{mean:+.1f} dB [{low:+.1f}, {high:+.1f}]"
        claims.append(Claim(sentence, measured, None if least is None else mean >= least and low > 0))

    for interval, wanted in GAINS.items():
        here = [one for one in whole if one.interval == interval and (one.branch == branch or one.method == NO_LAYER)]
        own = next((one for one in here if one.default), None)
        if own is None:
            continue
        where = f"interval {interval}, branch {branch}: "
        for other in sorted(here, key=lambda one: not one.ours):
            if not other.ours:
                claim(f"{where}the default over {other.method}", own, other, 0.0)
            elif other.forecast is False:
                claim(f"{where}the default over plain reuse, at least {wanted} dB", own, other, wanted)
        for one in (one for one in here if one.ours):
            if (fewer := shortened(results, in_operations, one.operations_speedup)) is not None:
                name, demand = ("the default", f", at least {OVER_FEWER:.0f} dB") if one.default else (one.method, "")
                speed = f"{one.operations_speedup:.2f}× in operations, over {fewer.label} steps at that speed"
                claim(f"{where}{name}, {speed}{demand}", one, fewer, OVER_FEWER if one.default else None)
    return claims


def forecast_time(bench: Bench, forecast: Setting, plain: Setting, repeats: int) -> Claim:
    """The forecast's own cost in time, by runs of the two side by side."""
    excess = statistics.median(own / base - 1 for own, base in bench.paired(forecast, plain, repeats)[0])
    sentence = f"{forecast.name}: time over plain reuse, at most {EXTRA_TIME:.0%}"
    return Claim(sentence, f"{excess:+.1%}, median of {repeats} pairs", excess <= EXTRA_TIME)


def of_overheads(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What the default forecast's reuse step takes above its bare layers, and against the published helper's."""
    claims, bound = [], f"at most {OVERHEAD:.0%} and below the published helper's"
    for row in rows:
        own = row["excess"][OURS]
        (published,) = (excess for name, excess in row["excess"].items() if not name.startswith("ours"))
        sentence = f"{row['layers']}: a reuse step above its bare layers, {bound}"
        claims.append(Claim(sentence, f"{own:+.1%} against {published:+.1%}", own <= OVERHEAD and own < published))
    return claims


def of_thresholds(results: Sequence[Result]) -> list[Claim]:
    """Ours on a transformer, against every peer at no lower hit rate and at no fewer operations saved.

    Only the one with its forecast is held to it. At equal operations it may take fewer steps as well; a hit rate says
    nothing across runs of unequal length.
    """
    claims = []
    peers = [name for name in dict.fromkeys(one.method for one in results if not one.ours) if name != UNCACHED]
    for forecast in sorted({one.forecast for one in results if one.forecast is not None}, reverse=True):
        ours = [one for one in results if one.forecast is forecast]
        for method in peers:
            points = [one for one in results if one.method == method]
            for unit, (axis, neutral) in UNITS.items():
                if method == FEWER and unit == "hit rate":
                    continue  # its calls are all whole ones
                alike = [one for one in ours if axis is in_operations or one.steps == results[0].steps]
                front = our_front(alike, axis)
                couples = [(one, at_least(front, axis, axis(one))) for one in points if axis(one) > neutral]
                claim = _against(f"{named(forecast)}: nearer than {method} at no lower {unit}", couples)
                claims.append(claim if forecast else dataclasses.replace(claim, holds=None))
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


def counted() -> list[Claim]:
    """The presets on the shapes of large models, without weights: a claim a preset, at each model's native size."""
    from diffusers import UNet2DConditionModel

    claims = []
    for model, config in (("SD1.5", SD15), ("SDXL", SDXL)):
        with torch.device("meta"):
            costs = UNetDenoiser(UNet2DConditionModel(**config)).branch_costs
        for name, (interval, depth, wanted) in PRESETS.items():
            if (branch := deepest_branch(costs, depth)) is not None:
                speedup = interval_speedup(interval, costs[branch])
                measured = f"{speedup:.2f}×, branch {branch}, a reuse step at {costs[branch]:.3f} of a full one"
                sentence = f"{model}, {name} (interval {interval}, depth {depth}): at least {wanted}×"
                claims.append(Claim(sentence, measured, speedup >= wanted))
    return claims
