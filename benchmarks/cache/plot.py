"""The Pareto plot of one model: PSNR over speed-up, in time and in operations."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cache.front import AXES, Axis, our_front
from benchmarks.cache.measure import Result
from benchmarks.report import interval, save

_OURS = ("#c1121f", "#f77f00", "#8d5a97", "#ff8fab", "#b56576", "#e0a100")
_PEERS = ("#1d4e89", "#2a9d8f", "#6c757d", "#577590", "#90be6d", "#43aa8b", "#264653", "#b08968")
_MARKERS = "svD^<>pP"


def draw(title: str, results: Sequence[Result], file: Path) -> None:
    """Write a PNG of what spared work; error bars are 95 % confidence intervals of the mean PSNR over the pictures."""
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (unit, axis) in zip(panels, AXES.items(), strict=True):
        _panel(panel, [one for one in results if one.acts], axis)
        panel.set_xlabel(f"speed-up of denoising, in {unit} (uncached = 1)")
    panels[0].set_ylabel("PSNR to the uncached picture, dB, mean")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    figure.suptitle(textwrap.fill(title.replace("`", ""), 170), fontsize="medium")
    save(figure, file)


def _panel(panel: Axes, results: Sequence[Result], axis: Axis) -> None:
    front = our_front(results, axis)
    style: dict[str, Any] = {"color": _OURS[0], "linewidth": 1.2, "alpha": 0.6, "label": "our front", "zorder": 2}
    panel.plot([axis(one) for one in front], [one.mean_psnr for one in front], **style)
    methods = dict.fromkeys(one.method for one in results)
    for ours in (False, True):
        for number, method in enumerate(name for name in methods if name.startswith("ours") == ours):
            points = [one for one in results if one.method == method]
            means, bounds = [one.mean_psnr for one in points], [interval(one.psnr_db) for one in points]
            errors = [[m - low for m, (low, _) in zip(means, bounds, strict=True)]]
            errors += [[high - m for m, (_, high) in zip(means, bounds, strict=True)]]
            style = {"color": _OURS[number % len(_OURS)], "marker": "o", "markersize": 6}
            if not ours:
                marker = _MARKERS[number % len(_MARKERS)]
                style = {"color": _PEERS[number % len(_PEERS)], "marker": marker, "markersize": 4}
            style |= {"linestyle": "none", "elinewidth": 0.6, "alpha": 0.85, "label": method, "zorder": 3}
            panel.errorbar([axis(one) for one in points], means, yerr=errors, **style)
    panel.axvline(1, color="black", linewidth=0.6)
    panel.grid(alpha=0.25)
