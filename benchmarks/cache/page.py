"""A line of the table that is printed, and the plot of the fronts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cache.front import in_operations
from benchmarks.cache.measure import Result
from benchmarks.cache.settings import FEWER, PRESET, WISHED
from benchmarks.report import save

COLUMNS = "setting | hit rate | speed-up in time | in operations | predicted | PSNR dB | 95 % | SSIM | LPIPS | kept"


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


_OURS, _SHORTER, _REPEATS, _FORECASTS = "#c1121f", "#333333", "#5b7fa6", "#e08e1b"
_REPEATING = ("DeepCache", "First Block Cache", "FasterCache", "MagCache")  # published; the others forecast
_FASTEST, _LOWEST, _HIGHEST = 6.0, 20.0, 62.0  # of the axes: times as fast, dB
_BESIDE, _ABOVE = 1.3, 1.6  # of two names: on the axes, what they are at least apart


def draw(panels: Mapping[str, Mapping[str, Sequence[Result]]], file: Path) -> None:
    """Write a PNG with a panel for each title: a line for each method, named at its end. Ours is `WISHED`'s."""
    from matplotlib.figure import Figure  # which only the plot needs
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13, 6.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, fronts) in zip(axes, panels.items(), strict=True):
        panel.set(xlim=(1, _FASTEST), ylim=(_LOWEST, _HIGHEST), title=title)
        panel.set_xlabel("times fewer operations than uncached")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
        _lines(panel, fronts)
    axes[0].set_ylabel("PSNR to the uncached picture, dB")
    told = [
        Line2D([], [], color=_OURS, linewidth=3.5, label=f"ours, by {WISHED}"),
        Line2D(
            [],
            [],
            color=_OURS,
            marker="o",
            markerfacecolor="white",
            linestyle="none",
            label=f"our {PRESET} and thresholds",
        ),
        Line2D([], [], color=_FORECASTS, label="published, forecasting"),
        Line2D([], [], color=_REPEATS, label="published, repeating"),
        Line2D([], [], color=_SHORTER, linestyle="--", label="no cache, fewer steps"),
    ]
    figure.legend(handles=told, loc="outside lower center", ncols=len(told), frameon=False, fontsize=11)
    save(figure, file)


def _lines(panel: Any, fronts: Mapping[str, Sequence[Result]]) -> None:
    from matplotlib.patheffects import withStroke

    named: list[tuple[float, float]] = []
    for method, front in fronts.items():
        seen = [one for one in front if in_operations(one) <= _FASTEST and one.mean_psnr >= _LOWEST]
        speeds, heights = [in_operations(one) for one in seen], [one.mean_psnr for one in seen]
        colour, ours = _colour(method), method == WISHED
        if method == PRESET:
            panel.plot(speeds, heights, "o", color=colour, markersize=7, markerfacecolor="white", zorder=5)
            continue
        dashes = "--" if method == FEWER else "-"
        width, dots = (3.5, "") if ours else (1.2, ".")
        panel.plot(speeds, heights, dashes, color=colour, linewidth=width, marker=dots, zorder=4 if ours else 2)
        if not seen or ours or method == FEWER:
            continue
        speed, height = speeds[-1], heights[-1]
        height = next(
            height + shift
            for shift in sorted(np.arange(-30, 30.1, 0.2), key=abs)
            if height + shift > _LOWEST
            and not any(abs(speed - x) < _BESIDE and abs(height + shift - y) < _ABOVE for x, y in named)
        )
        named.append((speed, height))
        edge = [withStroke(linewidth=2, foreground="white")]
        panel.text(speed + 0.05, height, method, va="center", color=colour, fontsize=8.5, zorder=6, path_effects=edge)


def _colour(method: str) -> str:
    own = {WISHED: _OURS, PRESET: _OURS, FEWER: _SHORTER}
    return own.get(method) or (_REPEATS if method in _REPEATING else _FORECASTS)
