"""The Pareto plot of one model: PSNR over speed-up, in time and in operations."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cache.front import AXES, Axis, our_front
from benchmarks.cache.measure import Result
from benchmarks.cache.quality import interval

_OURS = ("#c1121f", "#f77f00", "#8d5a97", "#ff8fab", "#b56576", "#e0a100")
_PEERS = ("#1d4e89", "#2a9d8f", "#6c757d", "#577590", "#90be6d", "#43aa8b", "#264653", "#b08968")
_MARKERS = "svD^<>pP"


def draw(title: str, results: Sequence[Result], file: Path) -> None:
    """Write a PNG of what spared work; error bars are 95 % confidence intervals of the mean PSNR over the pictures."""
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    results = [one for one in results if one.acts]
    for panel, (unit, axis) in zip(panels, AXES.items(), strict=True):
        _panel(panel, results, axis)
        panel.set_xlabel(f"speed-up of denoising, in {unit} (uncached = 1)")
    panels[0].set_ylabel("PSNR to the uncached picture, dB, mean")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    figure.suptitle(textwrap.fill(title.replace("`", ""), 170), fontsize="medium")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _panel(panel: Axes, results: Sequence[Result], axis: Axis) -> None:
    methods = list(dict.fromkeys(one.method for one in results))
    ours = [name for name in methods if name.startswith("ours")]
    peers = [name for name in methods if name not in ours]
    front = our_front(results, axis)
    panel.plot(
        [axis(one) for one in front],
        [one.mean_psnr for one in front],
        color="#c1121f",
        linewidth=1.2,
        alpha=0.6,
        label="our front",
        zorder=2,
    )
    for number, method in enumerate(peers):
        marker = _MARKERS[number % len(_MARKERS)]
        _points(panel, [one for one in results if one.method == method], axis, _PEERS[number % len(_PEERS)], marker, 4)
    for number, method in enumerate(ours):
        _points(panel, [one for one in results if one.method == method], axis, _OURS[number % len(_OURS)], "o", 6)
    panel.axvline(1, color="black", linewidth=0.6)
    panel.grid(alpha=0.25)


def _points(panel: Axes, results: Sequence[Result], axis: Axis, color: str, marker: str, size: float) -> None:
    means = [one.mean_psnr for one in results]
    intervals = [interval(one.psnr_db) for one in results]
    errors = [
        [mean - low for mean, (low, _) in zip(means, intervals, strict=True)],
        [high - mean for mean, (_, high) in zip(means, intervals, strict=True)],
    ]
    panel.errorbar(
        [axis(one) for one in results],
        means,
        yerr=errors,
        linestyle="none",
        marker=marker,
        markersize=size,
        color=color,
        elinewidth=0.6,
        alpha=0.85,
        label=results[0].method,
        zorder=3,
    )
