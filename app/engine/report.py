"""The cache reports of a job's batches as the one object of its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cache import CacheReport


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


def _finite(value: object) -> object:
    """A model that overflows gives residuals that JSON has no word for: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_finite(item) for item in value] if isinstance(value, list) else value
