"""docs/benchmarks.md, written from the figures and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cache.front import AXES, above
from benchmarks.cache.measure import Result
from benchmarks.claim import Claim, table


@dataclass(slots=True)
class Section:
    """One model's part of the page."""

    model: str
    conditions: str
    results: list[Result]
    plot: str  # relative to the page
    claims: list[Claim] = field(default_factory=list)
    overhead: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # settings that there was no time for


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


def write(
    file: Path,
    command: str,
    machine: dict[str, Any],
    sections: Sequence[Section],
    presets: Sequence[Claim],
    left_out: str,
) -> None:
    """`presets`: what was counted for other models; `left_out`: what of the full grid was not measured."""
    lines = [
        "# Benchmarks",
        "",
        f"Written by `{command}`; edit the command, not the figures.",
        "",
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads. Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
        + f". Commit {machine['commit']} (a + marks changes on top of it).",
        "",
        _HOW,
    ]
    if left_out:
        lines += [f"Left out of this run: {left_out}", ""]
    for section in sections:
        lines += _section(section)
    if presets:
        lines += ["## Presets on large models, counted", "", *table(presets)]
    gpu = file.with_name("benchmarks-gpu.md")
    lines += ["## On a GPU", ""]
    lines += (
        [f"See [{gpu.name}]({gpu.name})."]
        if gpu.exists()
        else ["Not run: no accelerator was at hand. `python -m benchmarks.gpu` measures SD1.5, SDXL and Flux geometry."]
    )
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _section(section: Section) -> list[str]:
    lines = [f"## {section.model}", "", section.conditions, ""]
    lines += [f"![PSNR over speed-up of {section.model}]({section.plot})", ""]
    if section.claims:
        lines += ["### What was demanded", "", *table(section.claims)]
    lines += ["### Peers above our front", "", *_fronts(section.results)]
    if section.overhead:
        lines += ["### A reuse step above its layers", "", *_overhead(section.overhead)]
    lines += ["### All points", "", *_table(section.results)]
    if section.missing:
        lines += [f"No time was left for: {', '.join(section.missing)}.", ""]
    return lines


def _fronts(results: Sequence[Result]) -> list[str]:
    lines = []
    for unit, axis in AXES.items():
        found = above(results, axis)
        if not found:
            lines += [f"By speed-up in {unit}: none.", ""]
            continue
        lines += [f"By speed-up in {unit}:", "", "| point | speed-up | PSNR dB | above by |", "|---|---|---|---|"]
        for point in sorted(found, key=lambda one: -1e9 if one.by is None else -one.by):
            by = "beyond its end" if point.by is None else f"{point.by:.1f} dB"
            lines.append(f"| {point.peer.name} | {point.speedup:.2f}× | {point.peer.mean_psnr:.1f} | {by} |")
        lines.append("")
    return lines


def _overhead(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = list(rows[0]["excess"])
    lines = [
        "Median time of a reuse step, and what it takes above the bare layers (median over paired calls).",
        "",
        "| layers | bare | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for row in rows:
        cells = [f"{row['milliseconds'][name]:.2f} ms, {row['excess'][name]:+.1%}" for name in names]
        lines.append(f"| {row['layers']} | {row['milliseconds']['bare']:.2f} ms | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| setting | hit rate | speed-up in time | in operations | predicted | PSNR dB | 95 % | SSIM | judged alike "
        "| kept |",
        "|---" * 10 + "|",
    ]
    for one in results:
        row = one.row()
        predicted = "" if row["predicted_speedup"] is None else f"{row['predicted_speedup']:.2f}×"
        kept = "" if one.cache_bytes is None else f"{one.cache_bytes / 2**10:.0f} KiB"
        alike = "" if one.agreement is None else f"{one.agreement:.0%}"
        low, high = row["psnr_interval"]
        lines.append(
            f"| {one.name} | {row['hit_rate']:.2f} | {row['speedup']:.2f}× | {row['operations_speedup']:.2f}× "
            f"| {predicted} | {row['psnr_db']:.1f} | {low:.1f}–{high:.1f} | {row['ssim']:.3f} | {alike} | {kept} |"
        )
    return [*lines, ""]
