"""docs/benchmarks.md and its plots, drawn from the figures and from nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cache.front import AXES, Axis, above, our_front
from benchmarks.cache.measure import Result
from benchmarks.report import Claim, interval, judged, markdown, named, save


@dataclass(slots=True)
class Section:
    """One model's part of the page."""

    model: str
    conditions: str
    results: list[Result]
    claims: list[Claim] = field(default_factory=list)
    overhead: list[dict[str, Any]] = field(default_factory=list)

    @property
    def plot(self) -> str:
        return f"images/pareto-{self.model}.png"


_HOW = """\
**Quality** is measured against the uncached picture of the same prompt and seed, on the 8-bit pictures: PSNR in dB
(equal pictures count as one sample off by one level) and SSIM (Wang et al. 2004), means over all pictures; intervals
are 95 % bootstrap intervals over the pictures, those of a difference over the paired differences. Fewer steps are held
against the same uncached picture. *Judged alike* is the share of pictures in which the embedded models' classifiers see
the same weather, place and time as in the uncached ones.

**Operations** are counted while those very pictures are drawn: matrix products, convolutions and attention that the
denoiser really ran, for ours and for peers alike. The hit rate is the share of denoiser calls that ran less than the
whole network; a reuse call of one method need not cost what another's does.

**Time** is that of the denoising loop of one picture, unbatched, each run with an uncached run directly beside it; a
speed-up is the median over those pairs of uncached by own seconds. Enabling a cache is not timed, for anyone.
"""
_OURS = ("#c1121f", "#f77f00", "#8d5a97", "#ff8fab", "#b56576", "#e0a100")
_PEERS = ("#1d4e89", "#2a9d8f", "#6c757d", "#577590", "#90be6d", "#43aa8b", "#264653", "#b08968")
_MARKERS = "svD^<>pP"
COLUMNS = (
    "setting | hit rate | speed-up in time | in operations | predicted | PSNR dB | 95 % | SSIM | judged alike | kept"
)


def write(file: Path, command: str, machine: Any, sections: Sequence[Section], presets: Sequence[Claim]) -> None:
    """`presets`: what was counted for other models."""
    here = "{device}, {cores} cores, {threads} threads. Python {python}".format(**machine)
    here += f", {named(machine['versions'])}. Commit {machine['commit']} (a + marks changes on top of it)."
    lines = ["# Benchmarks", "", f"Written by `{command}`; edit the command, not the figures.", "", here, "", _HOW]
    for section in sections:
        lines += [f"## {section.model}", "", section.conditions, ""]
        lines += [f"![PSNR over speed-up of {section.model}]({section.plot})", ""]
        if section.claims:
            lines += ["### What was demanded", "", *judged(section.claims)]
        lines += ["### Peers above our front", "", *_fronts(section.results)]
        if section.overhead:
            lines += ["### A reuse step above its layers", "", *_overhead(section.overhead)]
        lines += ["### All points", "", *markdown(COLUMNS, map(row, section.results))]
    if presets:
        lines += ["## Presets on large models, counted", "", *judged(presets)]
    lines += ["## On a GPU", "", "Not measured. Time and memory on a GPU come with scripts/gpu-check."]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _fronts(results: Sequence[Result]) -> list[str]:
    lines = []
    for unit, axis in AXES.items():
        found = sorted(above(results, axis), key=lambda one: -1e9 if one[1] is None else -one[1])
        rows = (
            f"{peer.name} | {axis(peer):.2f}× | {peer.mean_psnr:.1f} | "
            + ("beyond its end" if by is None else f"{by:.1f} dB")
            for peer, by in found
        )
        table = markdown("point | speed-up | PSNR dB | above by", rows)
        lines += [f"By speed-up in {unit}:", "", *table] if found else [f"By speed-up in {unit}: none.", ""]
    return lines


def _overhead(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = list(rows[0]["excess"])
    said = "Median time of a reuse step, and what it takes above the bare layers (median over paired calls)."
    cells = (
        " | ".join(
            [f"{one['layers']} | {one['milliseconds']['bare']:.2f} ms"]
            + [f"{one['milliseconds'][name]:.2f} ms, {one['excess'][name]:+.1%}" for name in names]
        )
        for one in rows
    )
    return [said, "", *markdown(" | ".join(["layers", "bare", *names]), cells)]


def row(one: Result) -> str:
    found = one.row()
    predicted = "" if found["predicted_speedup"] is None else f"{found['predicted_speedup']:.2f}×"
    kept = "" if one.cache_bytes is None else f"{one.cache_bytes / 2**10:.0f} KiB"
    alike = "" if one.agreement is None else f"{one.agreement:.0%}"
    low, high = found["psnr_interval"]
    return (
        f"{one.name} | {found['hit_rate']:.2f} | {found['speedup']:.2f}× | {found['operations_speedup']:.2f}× "
        f"| {predicted} | {found['psnr_db']:.1f} | {low:.1f}–{high:.1f} | {found['ssim']:.3f} | {alike} | {kept}"
    )


def draw(title: str, results: Sequence[Result], file: Path) -> None:
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
    figure.suptitle(textwrap.fill(title.replace("`", ""), 170), fontsize="medium")
    save(figure, file)


def _panel(panel: Any, results: Sequence[Result], axis: Axis) -> None:
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
