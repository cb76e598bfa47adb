"""What the service counts: one source for `/metrics`, `/api/telemetry` and the log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from app.errors import kinds

RECENT = 100  # requests that the recent hit rate looks back on
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16)
_TELEMETRY_NAMES = {"deepcache": "deepcache", "first_block": "fbcache", "fitted": "fitted"}
_FAULTS = sorted({error.type for error in kinds() if error.status >= 500 or error.status == 429})
"""Outcomes that are the server's doing, not the client's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUse:
    """What a cache did in one request, in denoiser calls."""

    model: str
    strategy: str
    computed: int
    reused: int
    cache_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        return hit_rate(self.computed, self.reused)


def hit_rate(computed: int, reused: int) -> float:
    return round(reused / (computed + reused), 4) if computed + reused else 0.0


@dataclass(slots=True)
class _CacheTotals:
    requests: int = 0
    computed: int = 0
    reused: int = 0
    recent: deque[CacheUse] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, use: CacheUse) -> None:
        self.requests += 1
        self.computed += use.computed
        self.reused += use.reused
        self.recent.append(use)

    def report(self) -> dict[str, object]:
        last = self.recent[-1] if self.recent else None
        return {
            "requests": self.requests,
            "computed_steps": self.computed,
            "reused_steps": self.reused,
            "hit_rate": hit_rate(self.computed, self.reused),
            "last": {**asdict(last), "hit_rate": last.hit_rate} if last else None,
            "recent_requests": len(self.recent),
            "recent_hit_rate": hit_rate(sum(u.computed for u in self.recent), sum(u.reused for u in self.recent)),
        }


class Metrics:
    """Counters of one app. What the engine is at the moment is no count: see `http/pages.py`."""

    def __init__(self) -> None:
        self.started = time.time()
        self.requests_processed = 0
        self.images_produced = 0
        self.batches_processed = 0
        self.last_drawn: float | None = None  # Unix seconds
        self.reused_runs = 0
        self._wait_seconds = 0.0
        self._caches = {name: _CacheTotals() for name in _TELEMETRY_NAMES}

        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        run = ["model", "strategy"]
        self._requests = counter("wavespeed_requests_total", "Generation requests answered.", ["model", "outcome"])
        self._wait = histogram("wavespeed_queue_wait_seconds", "Time a job waited for a worker.", buckets=_SECONDS)
        self._generation = histogram(
            "wavespeed_generation_seconds", "Time a job took on its worker.", run, buckets=_SECONDS
        )
        self._batch = histogram(
            "wavespeed_batch_images", "Images denoised together, of one job or several.", buckets=_IMAGES
        )
        self._steps = counter(
            "wavespeed_cache_steps_total",
            "Denoiser calls computed in full or served from the cache.",
            [*run, "outcome"],
        )
        self._cache_bytes = Gauge(
            "wavespeed_cache_bytes", "Most bytes the last run's cache held.", ["strategy"], registry=self.registry
        )
        self._images = counter("wavespeed_images_total", "Pictures drawn.", ["model"])
        self._reused_runs = counter(
            "wavespeed_reused_runs_total", "Runs of the denoiser that an earlier job had made already.", ["model"]
        )
        self._expect_answers("none")

    def answered(self, model: str | None, outcome: str) -> None:
        """Count an answer. `model` must be a configured name, or None where the request named none that exists."""
        self._requests.labels(model or "none", outcome).inc()

    def generated(
        self,
        use: CacheUse,
        *,
        queue_seconds: float,
        generation_seconds: float,
        images: int,
        batches: Sequence[int],
        reused_runs: int = 0,
    ) -> None:
        """Count a job that was done; `batches` and `reused_runs` as in JobResult."""
        self.requests_processed += 1
        self.images_produced += images
        self.batches_processed += len(batches)
        self.last_drawn = time.time()
        for size in batches:
            self._batch.observe(size)
        self._wait_seconds += queue_seconds
        self.reused_runs += reused_runs
        self._images.labels(use.model).inc(images)
        self._reused_runs.labels(use.model).inc(reused_runs)
        self._wait.observe(queue_seconds)
        self._generation.labels(use.model, use.strategy).observe(generation_seconds)
        self._steps.labels(use.model, use.strategy, "computed").inc(use.computed)
        self._steps.labels(use.model, use.strategy, "reused").inc(use.reused)
        if use.strategy in self._caches:
            self._caches[use.strategy].add(use)
            self._cache_bytes.labels(use.strategy).set(use.cache_bytes)

    @property
    def average_wait_seconds(self) -> float:
        return self._wait_seconds / self.requests_processed if self.requests_processed else 0.0

    def cache_report(self) -> dict[str, dict[str, object]]:
        """Telemetry's `cache`."""
        return {_TELEMETRY_NAMES[name]: totals.report() for name, totals in self._caches.items()}

    def expect(self, model: str, cache: str) -> None:
        """Begin the counters of a model at 0: PromQL's rate() is blind to the event that a series begins with.

        `cache`: the strategy that it can run.
        """
        self._expect_answers(model)
        self._images.labels(model)
        self._reused_runs.labels(model)
        for strategy in ("none", cache):
            self._generation.labels(model, strategy)
            for outcome in ("computed", "reused"):
                self._steps.labels(model, strategy, outcome)

    def _expect_answers(self, model: str) -> None:
        for outcome in ("ok", *_FAULTS):
            self._requests.labels(model, outcome)
