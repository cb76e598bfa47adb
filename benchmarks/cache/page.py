"""A model's part of docs/benchmarks.md, and the plot of the fronts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cache.front import AXES, above, in_operations
from benchmarks.cache.measure import Result
from benchmarks.cache.settings import FEWER, PRESET, WISHED
from benchmarks.report import Claim, judged, save, table

COLUMNS = "setting | hit rate | speed-up in time | in operations | predicted | PSNR dB | 95 % | SSIM | LPIPS | kept"


def part(results: Sequence[Result], claims: Sequence[Claim]) -> list[str]:
    demanded = ["### What was demanded", "", *judged(claims), "### Peers above our front", ""]
    fronts = table("by speed-up in | point | speed-up | PSNR dB | above by", _above(results))
    return [*demanded, *fronts, "### All points", "", *table(COLUMNS, map(row, results))]


def _above(results: Sequence[Result]) -> Iterator[str]:
    for unit, axis in AXES.items():
        found = list(above(results, axis))
        for peer, by in found:
            distance = "beyond its end" if by is None else f"{by:.1f} dB"
            yield f"{unit} | {peer.name} | {axis(peer):.2f}× | {peer.mean_psnr:.1f} | {distance}"
        if not found:
            yield f"{unit} | none | | | "


def row(one: Result) -> str:
    found = one.row()
    predicted = "" if one.predicted_speedup is None else f"{one.predicted_speedup:.2f}×"
    lpips = "" if found["lpips"] is None else f"{found['lpips']:.4f}"
    kept = "" if one.cache_bytes is None else f"{one.cache_bytes / 2**10:.0f} KiB"
    low, high = found["psnr_interval"]
    return (
        f"{one.name} | {one.hit_rate:.2f} | {one.speedup:.2f}× | {one.operations_speedup:.2f}× | {predicted} "
        f"| {one.mean_psnr:.1f} | {low:.1f}–{high:.1f} | {found['ssim']:.3f} | {lpips} | {kept}"
    )


_OURS, _SHORTER = "#c1121f", "#333333"
_KINDS = {  # of published caches: the colour, and by what a method's name begins
    "reuse": ("#7a8fa6", ("DeepCache", "First Block", "FasterCache", "MagCache")),
    "forecast": ("#e09f3e", ("TaylorSeer", "cache-dit", "Spectrum")),
    "forecast, when to by a gate": ("#2a7f62", ("DiCache", "SeaCache")),
}
_FASTEST, _LOWEST, _HIGHEST, _APART = 6.0, 20.0, 62.0, 1.5  # of the axes: times as fast, dB; of two names: dB


def draw(panels: Mapping[str, Mapping[str, Sequence[Result]]], file: Path) -> None:
    """Write a PNG with a panel for each title: a line for each method, named at its end. Ours is `WISHED`'s."""
    from matplotlib.figure import Figure  # which only the plot needs

    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, fronts) in zip(axes, panels.items(), strict=True):
        panel.set(xlim=(1, _FASTEST), ylim=(_LOWEST, _HIGHEST), title=title)
        panel.set_xlabel("times fewer operations than uncached")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
        _lines(panel, fronts)
    figure.axes[0].set_ylabel("PSNR to the uncached picture, dB")
    save(figure, file)


def _lines(panel: Any, fronts: Mapping[str, Sequence[Result]]) -> None:
    named: list[tuple[float, float, str, str, bool]] = []
    for method, front in fronts.items():
        seen = [one for one in front if in_operations(one) <= _FASTEST and one.mean_psnr >= _LOWEST]
        ours, colour = method == WISHED, _colour(method)
        if not seen:
            continue
        speeds, heights = [in_operations(one) for one in seen], [one.mean_psnr for one in seen]
        dashes = "--" if method == FEWER else "-"
        if method == PRESET:
            panel.plot(speeds, heights, "o", color=colour, markersize=7, markerfacecolor="white", zorder=3)
        else:
            panel.plot(speeds, heights, dashes, color=colour, linewidth=3.5 if ours else 1.2, zorder=4 if ours else 2)
        named.append((speeds[-1], heights[-1], "our presets" if method == PRESET else method, colour, ours))
    lowest = math.inf
    for speed, height, name, colour, ours in sorted(named, key=lambda one: -one[1]):
        lowest = min(height, lowest - _APART)
        font = {"color": colour, "fontsize": 12 if ours else 8.5, "fontweight": "bold" if ours else "normal"}
        panel.text(speed + 0.06, lowest, name, va="center", zorder=5, **font)


def _colour(method: str) -> str:
    if method in (WISHED, PRESET):
        return _OURS
    return next((colour for colour, names in _KINDS.values() if method.startswith(names)), _SHORTER)
