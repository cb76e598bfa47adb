"""A model's part of docs/benchmarks.md, and its plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cache.front import AXES, Axis, above, our_front
from benchmarks.cache.measure import Result, interval
from benchmarks.report import Claim, judged, save, table

COLUMNS = "setting | hit rate | speed-up in time | in operations | predicted | PSNR dB | 95 % | SSIM | kept"


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
    kept = "" if one.cache_bytes is None else f"{one.cache_bytes / 2**10:.0f} KiB"
    low, high = found["psnr_interval"]
    return (
        f"{one.name} | {one.hit_rate:.2f} | {one.speedup:.2f}× | {one.operations_speedup:.2f}× | {predicted} "
        f"| {one.mean_psnr:.1f} | {low:.1f}–{high:.1f} | {found['ssim']:.3f} | {kept}"
    )


def draw(results: Sequence[Result], file: Path) -> None:
    """Write a PNG of what spared work; error bars are 95 % confidence intervals of the mean PSNR over the pictures."""
    from matplotlib.figure import Figure  # which only the page needs

    figure = Figure(figsize=(15, 6.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (unit, axis) in zip(panels, AXES.items(), strict=True):
        _panel(panel, [one for one in results if one.acts], axis)
        panel.set_xlabel(f"speed-up of denoising, in {unit} (uncached = 1)")
    panels[0].set_ylabel("PSNR to the uncached picture, dB, mean")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    save(figure, file)


def _panel(panel: Any, results: Sequence[Result], axis: Axis) -> None:
    """Ours are dots in warm colours, the others crosses in cold ones."""
    from matplotlib import colormaps

    front = our_front(results, axis)
    panel.plot([axis(one) for one in front], [one.mean_psnr for one in front], color="black", label="our front")
    for ours, marker, colours in ((True, "o", "autumn"), (False, "x", "winter")):
        methods = list(dict.fromkeys(one.method for one in results if one.ours == ours))
        for method, colour in zip(methods, colormaps[colours](np.linspace(0, 0.8, len(methods))), strict=True):
            points = [one for one in results if one.method == method]
            means, bounds = [one.mean_psnr for one in points], [interval(one.psnr_db) for one in points]
            errors = [[abs(mean - bound[side]) for mean, bound in zip(means, bounds, strict=True)] for side in (0, 1)]
            style = {"color": colour, "marker": marker, "linestyle": "none", "elinewidth": 0.6, "label": method}
            panel.errorbar([axis(one) for one in points], means, yerr=errors, **style)
    panel.axvline(1, color="black", linewidth=0.6)
    panel.grid(alpha=0.25)
