"""GET /api/telemetry and GET /metrics: the same counters, for people and for Prometheus."""

from __future__ import annotations

import asyncio
import time

import psutil
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.engine.types import DeviceStatus, EngineStatus
from app.http.request import service_of

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
    return Response(service_of(request).metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


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
