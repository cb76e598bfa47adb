"""What is asked without a job: health, the models and adapters that there are, the documentation, the counters."""

from __future__ import annotations

import asyncio
import html
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from statistics import fmean

import fastapi_offline
import psutil
from fastapi import APIRouter, Request
from prometheus_client import generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp

from app.engine.types import NOT_LOADED, DeviceStatus, Engine, EngineStatus, ModelInfo, WorkerState
from app.errors import NotFound, NotReady, Unauthorized
from app.http.middleware import KEY_COOKIE, PAGE_ADDRESSES, PAGE_FOLDERS, PAGE_SOCKET, Guard, key_cookie
from app.http.render import errors
from app.http.request import body_of, service_of
from app.http.resolve import Adapters
from app.metrics import Metrics

router = APIRouter()

_OURS, _THEIRS = (Path(file).parent / "static" for file in (__file__, fastapi_offline.__file__))
_FILES = {
    "start.js": (_OURS, "text/javascript"),
    "swagger-ui-bundle.js": (_THEIRS, "text/javascript"),
    "swagger-ui.css": (_THEIRS, "text/css"),
    "favicon.png": (_THEIRS, "image/png"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _page(name: str) -> FileResponse:
    return FileResponse(_OURS / name, headers={"Content-Security-Policy": _POLICY})


@router.get("/", include_in_schema=False)
async def home() -> FileResponse:
    """Where the server has no page to draw on."""
    return _page("home.html")


_KEY_SECONDS = 30 * 24 * 3600  # for which a browser keeps the key


def page_routes(page: ASGIApp, guard: Guard) -> list[BaseRoute]:
    """The addresses that `page` is made of. Who has to give a key is asked for it at /, with a form."""

    async def entrance(request: Request) -> ASGIApp:
        return page if guard.admits(request.scope) else _key_form("")

    async def enter(request: Request) -> Response:
        form = urllib.parse.parse_qs((await body_of(request)).decode("ascii", "replace"))
        key = form.get("key", [""])[0].strip()
        try:
            guard.owner_of_key(key)
        except Unauthorized:
            return _key_form("That is none of this server's keys.")
        answer = RedirectResponse("./", 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(KEY_COOKIE, key_cookie(key), _KEY_SECONDS, httponly=True, samesite="strict", secure=secure)
        return answer

    parts = [address for address in PAGE_ADDRESSES if address not in ("/", PAGE_SOCKET)]
    return [
        Route("/", entrance, methods=["GET"], include_in_schema=False),
        Route("/", enter, methods=["POST"], include_in_schema=False),
        WebSocketRoute(PAGE_SOCKET, page),
        *(Route(address, page) for address in parts),
        *(Route(f"{folder}{{rest:path}}", page) for folder in PAGE_FOLDERS),
    ]


def _key_form(said: str) -> Response:
    """Asks a browser for a key. `said`: what was wrong with the one that it gave."""
    words = (_OURS / "key.html").read_text(encoding="utf-8").replace("{said}", html.escape(said))
    policy = _POLICY.replace("form-action 'none'", "form-action 'self'")
    # Without a referrer a browser would not say either that the form is ours.
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "same-origin"}
    return HTMLResponse(words, Unauthorized.status, headers)


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    return _page("docs.html")


@router.get("/docs/{name}", include_in_schema=False)
async def file(name: str) -> FileResponse:
    if name not in _FILES:
        raise NotFound("There is no such file of the documentation page.")
    path, kind = _FILES[name]
    headers = {"Cache-Control": "public, max-age=86400"} if path is _THEIRS else None
    return FileResponse(path / name, media_type=kind, headers=headers)


@router.get("/health", summary="The process answers", tags=["health"])
@router.get("/livez", summary="The process answers", tags=["health"])
async def alive() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/queue/status", summary="How many wait, as Gradio says it", tags=["health"], responses=errors(401))
async def queue_status(request: Request) -> dict[str, object]:
    """Where clients of AUTOMATIC1111's page look whether it is there."""
    return {"msg": "estimation", "queue_size": service_of(request).engine.status().pending}


@router.get("/readyz", summary="A worker can take a job", tags=["health"], responses=errors(503))
async def ready(request: Request) -> dict[str, object]:
    """`quarantined`: models that no worker is given at present, `unavailable`: those that cannot be loaded, each with
    the reason. The others are served.
    """
    engine = service_of(request).engine
    status = engine.status()
    if not status.ready:
        raise NotReady(_why_not(status), retry_after=5)
    return {
        "status": "ok",
        "workers": {device.device: device.state.value for device in status.devices},
        "quarantined": dict(status.quarantined),
        "unavailable": {
            name: reason for name, model in _known_models(engine).items() if (reason := _not_loaded(model, status))
        },
    }


def _known_models(engine: Engine) -> Mapping[str, ModelInfo]:
    """By name; none while they are not known yet."""
    try:
        return engine.catalogue().models
    except NotReady:
        return {}


def _not_loaded(model: ModelInfo, status: EngineStatus) -> str | None:
    """Why the model cannot be loaded, as far as is known."""
    if model.error is None or model.name in status.loaded:
        return status.unavailable.get(model.name)
    return NOT_LOADED  # what is wrong with its files names folders of this machine: that is for the log


def _why_not(status: EngineStatus) -> str:
    if status.draining:
        return "The server is shutting down: it finishes what it has accepted and takes nothing more."
    workers = [
        f"{device.device} is {device.state.value}"
        + (f" {device.loading}" if device.loading else "")
        + (f" (the last worker was lost: {device.reason})" if device.reason else "")
        for device in status.devices
    ]
    held = [f"{model} is quarantined: {reason}" for model, reason in status.quarantined.items()]
    return " ".join(["No worker can take a job now:", f"{'; '.join(workers) or 'there is none'}.", *held])


@router.get(
    "/api/adapters",
    summary="The LoRAs, embeddings, upscalers and ControlNets that a request can name",
    tags=["models"],
    responses=errors(401),
)
def adapters(request: Request) -> dict[str, list[str]]:
    """Read from the folders at each call. Whether one fits a model is seen when it is used."""
    folders = Adapters(service_of(request).settings)
    return {name: list(getattr(folders, name).files()) for name in ("loras", "embeddings", "upscalers", "controlnets")}


@router.get(
    "/api/models", summary="The models, their caches and their samplers", tags=["models"], responses=errors(401, 503)
)
async def models(request: Request) -> dict[str, object]:
    """`branches` are the places where DeepCache can cut, with a reuse step's share of a full one at each.

    What lies in the folder of checkpoints and is no model here has a row of `name`, `available`, `reason` and `loaded`.
    """
    engine = service_of(request).engine
    catalogue, status = engine.catalogue(), engine.status()
    return {
        "default": catalogue.default,
        "default_flux": catalogue.default_flux,
        "models": [
            *(_row(model, status) for model in catalogue.models.values()),
            *(
                {"name": name, "available": False, "reason": reason, "loaded": False}
                for name, reason in catalogue.unserved.items()
            ),
        ],
    }


def _row(model: ModelInfo, status: EngineStatus) -> dict[str, object]:
    """`reason` says why a model is not available; `plan` where a loaded one's networks lie on a GPU."""
    row = asdict(model)
    del row["error"], row["profile"]
    reason = status.quarantined.get(model.name) or _not_loaded(model, status)
    return {
        **row,
        "available": reason is None,
        "reason": reason,
        "loaded": model.name in status.loaded,
        "plan": status.plans.get(model.name),
    }


_MB, _GB = 2**20, 2**30


@router.get("/api/telemetry", tags=["telemetry"], summary="What the service has done and what it holds")
async def telemetry(request: Request) -> dict[str, object]:
    """`total_vram`, `used_vram`, `free_vram` are in GB, the other memory figures in MB; `*_ts` in Unix seconds.

    `cache` says for each strategy how many denoiser calls were computed and reused: in all, in the last request and
    over the last 100. `pending_by_signature` counts the waiting requests by model.
    """
    service = service_of(request)
    metrics, status, settings = service.metrics, service.engine.status(), service.settings
    waiting, now = service.jobs.waiting(), time.time()
    return {
        "uptime_seconds": round(time.time() - metrics.started, 3),
        "server_start_ts": metrics.started,
        "pending_count": status.pending,
        "pending_by_signature": Counter(record.model for record in waiting),
        "pending_avg_wait_s": round(fmean([now - record.created for record in waiting] or [0.0]), 4),
        "running_count": status.running,
        "worker_running": status.ready,
        "requests_processed": metrics.requests_processed,
        "images_produced": metrics.images_produced,
        "items_processed": metrics.images_produced,
        "batches_processed": metrics.batches_processed,
        "last_batch_time": metrics.last_drawn,
        "max_batch_size": settings.max_batch_size,
        "max_images_per_group": settings.max_batch_size,
        "batch_timeout": settings.batch_timeout,
        "reused_runs": metrics.reused_runs,
        "avg_processed_wait_s": round(metrics.average_wait_seconds, 4),
        "memory_info": await asyncio.to_thread(_memory_info, status),
        "devices": [_device(device) for device in status.devices],
        "loaded_models": sorted(status.loaded),
        "loaded_models_count": len(status.loaded),
        "pipeline_import_ok": status.ready,
        "pipeline_import_error": None if status.ready else _why_not(status),
        "cache": metrics.cache_report(),
    }


@router.get("/metrics", tags=["telemetry"], summary="Prometheus text", response_class=Response)
async def prometheus(request: Request) -> Response:
    """In the form that Accept asks for: OpenMetrics, or the plain text format."""
    service = service_of(request)
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    text = exposition(service.metrics, service.engine, encode)
    return Response(text, headers={"Content-Type": content_type})


def exposition(metrics: Metrics, engine: Engine, encode: Callable[[Collector], bytes] = generate_latest) -> bytes:
    """What was counted, and what the engine is now."""
    models = _known_models(engine)
    for name, info in models.items():
        metrics.expect(name, info.cache)
    return encode(_Everything(metrics, engine.status(), models))


@dataclass(frozen=True, slots=True)
class _Everything(Collector):
    """The counters, and gauges of this one reading: a device or a model that is gone is not to look as it last did."""

    metrics: Metrics
    status: EngineStatus
    models: Mapping[str, ModelInfo]

    def collect(self) -> Iterator[Metric]:
        status = self.status
        yield from self.metrics.registry.collect()
        yield GaugeMetricFamily("wavespeed_queue_depth", "Jobs waiting for a worker.", status.pending)
        yield GaugeMetricFamily("wavespeed_queue_capacity", "Jobs that may wait at once.", status.capacity)
        yield GaugeMetricFamily("wavespeed_jobs_running", "Jobs that a worker has.", status.running)
        for name, words, value in (
            ("wavespeed_gpu_memory_used_bytes", "GPU memory in use.", attrgetter("memory.used")),
            ("wavespeed_gpu_memory_total_bytes", "GPU memory there is.", attrgetter("memory.total")),
            ("wavespeed_worker_restarts", "Workers started after the first.", attrgetter("restarts")),
            ("wavespeed_worker_ready", "1 when the device's worker can take jobs.", attrgetter("ready")),
        ):
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
            for model in self.models:
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
        "system_ram_mb": round(resident_bytes(status) / _MB, 1),
    }


def resident_bytes(status: EngineStatus) -> int:
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
        **{name: getattr(device, name) for name in ("device", "kind", "name", "pid", "restarts", "loading", "reason")},
        "state": device.state.value,
        "total_vram": round(device.memory.total / _GB, 3),
        "used_vram": round(device.memory.used / _GB, 3),
        "loaded_models": list(device.loaded),
    }
