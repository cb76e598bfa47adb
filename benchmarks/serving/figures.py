"""What a load's samples come to."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.serving.load import Sample


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least `share` of them do not exceed: a measured one, never one in between."""
    return float(np.percentile(values, 100 * share, method="inverted_cdf")) if values else float("nan")


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds. Of no values: NaN."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        mean = float(np.mean(values)) if values else float("nan")
        return cls(mean, *(percentile(values, share) for share in (0.5, 0.95, 0.99)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of what was scheduled within the windows that count, `seconds` long together.

    offered: requests a second; finished: images a second, of answers that came within a window, whenever they were
    asked for, the median over the windows. latency: of requests that got their pictures; wait: how long they queued, as
    the server says; both are None where there is none. within: share of all requests that got their pictures within the
    objective, so a refused one is a miss; goodput: those a second. late: between schedule and sending, the client's own
    fault.
    """

    seconds: float
    requests: int
    offered: float
    finished: float
    latency: Spread | None
    wait: Spread | None
    service: Spread | None
    objective: float
    within: float
    goodput: float
    hit_rate: float | None
    statuses: dict[str, int] = field(default_factory=dict)
    without_retry_after: int
    refusal: Spread | None
    late: float


def figures(samples: Sequence[Sample], windows: Sequence[tuple[float, float]], objective: float) -> Figures:
    """`windows`: from and up to when, in seconds of the load."""
    seconds = sum(until - since for since, until in windows)
    counted = [one for one in samples if any(since <= one.scheduled < until for since, until in windows)]
    answered = [one for one in counted if one.ok]
    refused = [one for one in counted if one.answer.status in (429, 503)]
    finished = [
        sum(one.answer.images for one in samples if one.ok and since <= one.finished < until) / (until - since)
        for since, until in windows
    ]
    good = sum(one.latency <= objective for one in answered)
    computed = sum(one.answer.computed for one in answered)
    reused = sum(one.answer.reused for one in answered)
    return Figures(
        seconds=seconds,
        requests=len(counted),
        offered=len(counted) / seconds,
        finished=statistics.median(finished),
        latency=_spread([one.latency for one in answered]),
        wait=_spread([one.answer.queue for one in answered if one.answer.queue is not None]),
        service=_spread([one.answer.service for one in answered if one.answer.service is not None]),
        objective=objective,
        within=good / len(counted) if counted else float("nan"),
        goodput=good / seconds,
        hit_rate=reused / (computed + reused) if computed + reused else None,
        statuses={str(status): count for status, count in sorted(Counter(o.answer.status for o in counted).items())},
        without_retry_after=sum(not one.answer.retry_after for one in refused),
        refusal=_spread([one.latency for one in refused]),
        late=percentile([one.sent - one.scheduled for one in counted], 0.99),
    )


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None
