"""The cache reports of a job's batches as the one object of its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cache import CacheReport
from models.base import PassReport


def summarise(reports: Sequence[CacheReport]) -> dict[str, object]:
    """Calls are summed, the batches' decisions stand beside each other with a space between them.

    Raises ValueError for no report at all: a run always has one a batch.
    """
    if not reports:
        raise ValueError("a generation must report on its cache, once a batch")
    first = reports[0]
    whole = CacheReport(
        strategy=first.strategy,
        settings=dict(first.settings),
        decisions="".join(report.decisions for report in reports),
        reuse_cost=first.reuse_cost,
        cache_bytes=max(report.cache_bytes for report in reports),
        residuals=[residual for report in reports for residual in report.residuals],
        item_decisions=[letters for report in reports for letters in report.item_decisions],
    )
    summary = whole.as_dict()
    summary["decisions"] = " ".join(report.decisions for report in reports)
    return {key: _finite(value) for key, value in summary.items()}


def summarise_passes(passes: Sequence[PassReport]) -> dict[str, object]:
    """The summary of all runs; where there are others than the base pass, also one a pass, by name, under `passes`.

    Raises ValueError for no run at all.
    """
    summary = summarise([one.cache for one in passes])
    if all(one.name == "base" and not one.sizes for one in passes):
        return summary
    summary["predicted_speedup"] = _speedup(passes)
    rows = []
    for name in dict.fromkeys(one.name for one in passes):
        runs = [one for one in passes if one.name == name]
        whole = summarise([one.cache for one in runs])
        row: dict[str, object] = {
            "name": name,
            "runs": len(runs),
            "width": runs[0].width,
            "height": runs[0].height,
            "steps": runs[0].steps,
            **{key: whole[key] for key in ("computed", "reused", "hit_rate", "decisions")},
            "predicted_speedup": _speedup(runs),
            "cache_bytes": whole["cache_bytes"],
        }
        if any(one.sizes for one in runs):
            row |= {"sizes": " ".join(one.sizes for one in runs), "small_share": round(runs[0].small_share, 4)}
        rows.append(row)
    summary["passes"] = rows
    return summary


def _speedup(passes: Sequence[PassReport]) -> float | None:
    """Operations of these runs without a cache by those with it, a call's taken as proportional to its latents."""
    without = spent = 0.0
    for one in passes:
        report = one.cache
        if report.reused and report.reuse_cost is None:
            return None
        sizes = one.sizes if len(one.sizes) == len(report.decisions) else "F" * len(report.decisions)
        for decision, size in zip(report.decisions, sizes, strict=True):
            call = one.width * one.height * (one.small_share if size == "S" else 1.0)
            without += call
            spent += call * ((report.reuse_cost or 0.0) if decision == "R" else 1.0)
    return round(without / spent, 3) if spent else 1.0


def _finite(value: object) -> object:
    """A model that overflows gives residuals that JSON has no word for: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_finite(item) for item in value] if isinstance(value, list) else value
