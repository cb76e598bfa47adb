"""GET /api/telemetry and GET /metrics: the same counters, for people and for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping

import psutil
from fastapi import APIRouter, Request, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.engine.types import DeviceStatus, Engine, EngineStatus, ModelInfo, WorkerState
from app.http.request import known_models, service_of
from app.metrics import Metrics

router = APIRouter(tags=["telemetry"])
_MB, _GB = 2**20, 2**30


@router.get("/api/telemetry", summary="What the service has done and what it holds")
async def telemetry(request: Request) -> dict[str, object]:
    """`total_vram`, `used_vram`, `free_vram` are in GB, the other memory figures in MB; `*_ts` in Unix seconds.

    `cache` says for each strategy how many denoiser calls were computed and reused: in all, in the last request and
    over the last 100.
    """
    service = service_of(request)
    metrics, status = service.metrics, service.engine.status()
    return {
        "uptime_seconds": round(time.time() - metrics.started, 3),
        "server_start_ts": metrics.started,
        "pending_count": status.pending,
        "running_count": status.running,
        "worker_running": status.ready,
        "requests_processed": metrics.requests_processed,
        "images_produced": metrics.images_produced,
        "batches_processed": metrics.batches_processed,
        "avg_processed_wait_s": round(metrics.average_wait_seconds, 4),
        "memory_info": await asyncio.to_thread(_memory_info, status),
        "devices": [_device(device) for device in status.devices],
        "loaded_models": sorted(status.loaded),
        "cache": metrics.cache_report(),
    }


@router.get("/metrics", summary="Prometheus text", response_class=Response)
async def prometheus(request: Request) -> Response:
    """In the form that Accept asks for: OpenMetrics, or the plain text format."""
    service = service_of(request)
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    text = exposition(service.metrics, service.engine, encode)
    return Response(text, headers={"Content-Type": content_type})


def exposition(metrics: Metrics, engine: Engine, encode: Callable[[Collector], bytes] = generate_latest) -> bytes:
    """What was counted, and what the engine is now."""
    models = known_models(engine)
    for name, info in models.items():
        metrics.expect(name, info.cache)
    return encode(_Everything(metrics, engine.status(), models))


class _Everything(Collector):
    """The counters, and gauges of this one reading: a device or a model that is gone is not to look as it last did."""

    def __init__(self, metrics: Metrics, status: EngineStatus, models: Mapping[str, ModelInfo]) -> None:
        self._metrics = metrics
        self._status = status
        self._models = models

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics.registry.collect()
        status = self._status
        yield GaugeMetricFamily("wavespeed_queue_depth", "Jobs waiting for a worker.", status.pending)
        yield GaugeMetricFamily("wavespeed_queue_capacity", "Jobs that may wait at once.", status.capacity)
        yield GaugeMetricFamily("wavespeed_jobs_running", "Jobs that a worker has.", status.running)
        by_device: dict[tuple[str, str], Callable[[DeviceStatus], float]] = {
            ("wavespeed_gpu_memory_used_bytes", "GPU memory in use."): lambda device: device.memory.used,
            ("wavespeed_gpu_memory_total_bytes", "GPU memory there is."): lambda device: device.memory.total,
            ("wavespeed_worker_restarts", "Workers started after the first."): lambda device: device.restarts,
            ("wavespeed_worker_ready", "1 when the device's worker can take jobs."): lambda device: device.ready,
        }
        for (name, words), value in by_device.items():
            gauge = GaugeMetricFamily(name, words, labels=["device"])
            for device in status.devices:
                gauge.add_metric([device.device], value(device))
            yield gauge
        states = GaugeMetricFamily(
            "wavespeed_worker_state", "1 for the state its worker is in.", labels=["device", "state"]
        )
        for device in status.devices:
            for state in WorkerState:
                states.add_metric([device.device, state.value], device.state is state)
        yield states
        for name, words, names in (
            ("wavespeed_model_quarantined", "1 when no worker is given the model.", status.quarantined),
            ("wavespeed_model_unavailable", "1 when the model cannot be loaded.", status.unavailable),
            ("wavespeed_model_loaded", "1 when some worker holds the model.", status.loaded),
        ):
            gauge = GaugeMetricFamily(name, words, labels=["model"])
            for model in self._models:
                gauge.add_metric([model], model in names)
            yield gauge


def _memory_info(status: EngineStatus) -> dict[str, float]:
    memories = [device.memory for device in status.devices]
    total, used = sum(memory.total for memory in memories), sum(memory.used for memory in memories)
    return {
        "total_vram": round(total / _GB, 3),
        "used_vram": round(used / _GB, 3),
        "free_vram": round((total - used) / _GB, 3),
        "vram_allocated_mb": round(sum(memory.allocated for memory in memories) / _MB, 1),
        "vram_reserved_mb": round(sum(memory.reserved for memory in memories) / _MB, 1),
        "vram_peak_mb": round(sum(memory.peak for memory in memories) / _MB, 1),
        "system_ram_mb": round(_resident_bytes(status) / _MB, 1),
    }


def _resident_bytes(status: EngineStatus) -> int:
    """Of this process and its workers."""
    resident: int = psutil.Process().memory_info().rss
    for device in status.devices:
        try:
            resident += psutil.Process(device.pid).memory_info().rss if device.pid else 0
        except psutil.Error:
            continue  # it died since the status was taken
    return resident


def _device(device: DeviceStatus) -> dict[str, object]:
    return {
        "device": device.device,
        "kind": device.kind,
        "name": device.name,
        "state": device.state.value,
        "pid": device.pid,
        "restarts": device.restarts,
        "total_vram": round(device.memory.total / _GB, 3),
        "used_vram": round(device.memory.used / _GB, 3),
        "loaded_models": list(device.loaded),
        "loading": device.loading,
        "reason": device.reason,
    }
