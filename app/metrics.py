"""What the service counts: one source for `/metrics`, `/api/telemetry` and the log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from app.engine.types import Catalogue, EngineStatus, ModelInfo, WorkerState
from app.errors import ServiceError

RECENT = 100  # requests that the recent hit rate looks back on
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16)
_TELEMETRY_NAMES = {"deepcache": "deepcache", "first_block": "fbcache"}


def _types(error: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield error
    for narrower in error.__subclasses__():
        yield from _types(narrower)


_FAULTS = sorted({error.type for error in _types(ServiceError) if error.status >= 500 or error.status == 429})
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


class _CacheTotals:
    def __init__(self) -> None:
        self.requests = 0
        self.computed = 0
        self.reused = 0
        self.recent: deque[CacheUse] = deque(maxlen=RECENT)

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
    """Counters of one app. `status` and `catalogue` are asked whenever the metrics are read."""

    def __init__(self, status: Callable[[], EngineStatus], catalogue: Callable[[], Catalogue | None]) -> None:
        self._status = status
        self._catalogue = catalogue
        self.started = time.time()
        self.requests_processed = 0
        self.images_produced = 0
        self.batches_processed = 0
        self._wait_seconds = 0.0
        self._caches = {name: _CacheTotals() for name in _TELEMETRY_NAMES}

        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "wavespeed_requests_total", "Generation requests answered.", ["model", "outcome"], registry=registry
        )
        self._wait = Histogram(
            "wavespeed_queue_wait_seconds", "Time a job waited for a worker.", buckets=_SECONDS, registry=registry
        )
        self._generation = Histogram(
            "wavespeed_generation_seconds",
            "Time a job took on its worker.",
            ["model", "strategy"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch = Histogram(
            "wavespeed_batch_images",
            "Images denoised together, of one job or several.",
            buckets=_IMAGES,
            registry=registry,
        )
        self._steps = Counter(
            "wavespeed_cache_steps_total",
            "Denoiser calls computed in full or served from the cache.",
            ["model", "strategy", "outcome"],
            registry=registry,
        )
        self._cache_bytes = Gauge(
            "wavespeed_cache_bytes", "Most bytes the last run's cache held.", ["strategy"], registry=registry
        )
        self._images = Counter("wavespeed_images_total", "Pictures drawn.", ["model"], registry=registry)
        self._queue_depth = Gauge("wavespeed_queue_depth", "Jobs waiting for a worker.", registry=registry)
        self._queue_capacity = Gauge("wavespeed_queue_capacity", "Jobs that may wait at once.", registry=registry)
        self._running = Gauge("wavespeed_jobs_running", "Jobs that a worker has.", registry=registry)
        self._memory_used = Gauge(
            "wavespeed_gpu_memory_used_bytes", "GPU memory in use.", ["device"], registry=registry
        )
        self._memory_total = Gauge(
            "wavespeed_gpu_memory_total_bytes", "GPU memory there is.", ["device"], registry=registry
        )
        self._restarts = Gauge(
            "wavespeed_worker_restarts", "Workers started after the first.", ["device"], registry=registry
        )
        self._worker_ready = Gauge(
            "wavespeed_worker_ready", "1 when the device's worker can take jobs.", ["device"], registry=registry
        )
        self._worker_state = Gauge(
            "wavespeed_worker_state", "1 for the state its worker is in.", ["device", "state"], registry=registry
        )
        self._quarantined = Gauge(
            "wavespeed_model_quarantined", "1 when no worker is given the model.", ["model"], registry=registry
        )
        self._loaded = Gauge(
            "wavespeed_model_loaded", "1 when some worker holds the model.", ["model"], registry=registry
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
    ) -> None:
        """Count a job that was done; `batches` as in JobResult."""
        self.requests_processed += 1
        self.images_produced += images
        self.batches_processed += len(batches)
        for size in batches:
            self._batch.observe(size)
        self._wait_seconds += queue_seconds
        self._images.labels(use.model).inc(images)
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

    def exposition(self) -> bytes:
        """Prometheus text."""
        status, catalogue = self._status(), self._catalogue()
        self._queue_depth.set(status.pending)
        self._queue_capacity.set(status.capacity)
        self._running.set(status.running)
        by_device = (self._memory_used, self._memory_total, self._restarts, self._worker_ready, self._worker_state)
        for gauge in by_device:
            gauge.clear()  # a device that is gone, as a replica can be, is not to look as it last did
        for device in status.devices:
            self._memory_used.labels(device.device).set(device.memory.used)
            self._memory_total.labels(device.device).set(device.memory.total)
            self._restarts.labels(device.device).set(device.restarts)
            self._worker_ready.labels(device.device).set(device.ready)
            for state in WorkerState:
                self._worker_state.labels(device.device, state.value).set(device.state is state)
        for name, info in catalogue.models.items() if catalogue else ():
            self._expect(info)
            self._loaded.labels(name).set(name in status.loaded)
            self._quarantined.labels(name).set(name in status.quarantined)
        return generate_latest(self.registry)

    def _expect(self, model: ModelInfo) -> None:
        """Begin the model's counters at 0: PromQL's rate() is blind to the event that a series begins with."""
        self._expect_answers(model.name)
        self._images.labels(model.name)
        for strategy in ("none", model.cache):
            self._generation.labels(model.name, strategy)
            for outcome in ("computed", "reused"):
                self._steps.labels(model.name, strategy, outcome)

    def _expect_answers(self, model: str) -> None:
        for outcome in ("ok", *_FAULTS):
            self._requests.labels(model, outcome)
