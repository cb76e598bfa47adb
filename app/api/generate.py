"""POST /api/generate: one request, one answer, nothing left running when the client goes."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from app.api.accept import accepted_image
from app.api.answers import GenerateAnswer, errors
from app.api.body import read_object
from app.api.resolve import Limits, resolve
from app.api.schemas import EXAMPLE, GenerateRequest, parse
from app.api.service import Service, request_id_of, service_of
from app.engine.base import CacheSummary, Engine, Job, JobHandle, JobResult, OutputFormat
from app.errors import Cancelled, Incompatible, ServiceError
from app.metrics import CacheUse, hit_rate
from models.base import Step

_log = logging.getLogger(__name__)

router = APIRouter(tags=["generate"])
_BYTES = {"schema": {"type": "string", "format": "binary"}}


@router.post(
    "/api/generate",
    summary="Draw pictures",
    response_model=GenerateAnswer,
    responses={
        200: {
            "description": "The pictures and the report; or, if Accept names a picture type, the picture's bytes with "
            "the report in X-WaveSpeed-* headers.",
            "content": {"image/png": _BYTES, "image/jpeg": _BYTES, "image/webp": _BYTES},
        },
        **errors(401, 404, 413, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/GenerateRequest"},
                    "examples": {"document": {"summary": "A misty forest, DeepCache balanced", "value": EXAMPLE}},
                }
            },
        }
    },
)
async def generate(request: Request) -> Response:
    service = service_of(request)
    model: str | None = None
    outcome = "internal"
    try:
        fields = parse(await read_object(request, service.settings))
        as_bytes = _picture_format(request, fields)
        limits = Limits.of(service.settings)
        output_format = as_bytes or fields.output_format
        job = resolve(fields, service.engine.catalogue(), limits, request_id_of(request), output_format)
        model = job.model
        handle = service.engine.submit(job, _step_logger(job))
        result = await _result(request, service.engine, handle)
        outcome = "ok"
        _observe(service, handle, result)
        return _bytes_answer(handle, result) if as_bytes else await asyncio.to_thread(_json_answer, handle, result)
    except ServiceError as error:
        outcome = error.type
        _log.info("refused status=%d type=%s field=%s: %s", error.status, error.type, error.field, error.message)
        raise
    except asyncio.CancelledError:
        outcome = Cancelled.type
        raise
    finally:
        service.metrics.answered(model, outcome)


def _picture_format(request: Request, fields: GenerateRequest) -> OutputFormat | None:
    wanted = accepted_image(request.headers.get("accept", ""), fields.output_format)
    if wanted is None:
        return None
    if fields.num_images > 1:
        raise Incompatible(
            "An answer of type image holds one picture; accept application/json for several.", field="num_images"
        )
    if "output_format" in fields.model_fields_set and fields.output_format != wanted:
        raise Incompatible(
            f"Accept asks for {wanted} and output_format for {fields.output_format}; leave one of them out.",
            field="output_format",
        )
    return wanted


async def _result(request: Request, engine: Engine, handle: JobHandle) -> JobResult:
    """The job's result, unless the client leaves first; then the job is cancelled. The server doesn't do it for us."""
    gone = asyncio.create_task(_disconnected(request))
    try:
        either: set[asyncio.Future[Any]] = {handle.result, gone}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if handle.result.done():
            return handle.result.result()
        raise Cancelled("The client left before the picture was done.")
    finally:
        gone.cancel()
        if not handle.result.done():
            engine.cancel(handle.job.id)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _step_logger(job: Job) -> _StepLogger | None:
    return _StepLogger(job) if _log.isEnabledFor(logging.DEBUG) else None


class _StepLogger:
    """One DEBUG line a step. Called outside the request's context, hence the id."""

    def __init__(self, job: Job) -> None:
        self._strategy = job.strategy.name
        self._extra = {"request_id": job.id}

    def __call__(self, step: Step) -> None:
        _log.debug(
            "cache strategy=%s step=%d/%d decision=%s",
            self._strategy,
            step.index + 1,
            step.total,
            step.decision,
            extra=self._extra,
        )


def _observe(service: Service, handle: JobHandle, result: JobResult) -> None:
    """The one place where a finished job is counted and logged."""
    params, cache = handle.job.params, result.cache
    use = CacheUse(
        model=handle.job.model,
        strategy=handle.job.strategy.name,
        computed=_count(cache, "computed"),
        reused=_count(cache, "reused"),
        cache_bytes=_count(cache, "cache_bytes"),
    )
    service.metrics.generated(
        use,
        queue_seconds=handle.queue_seconds,
        generation_seconds=handle.total_seconds - handle.queue_seconds,
        images=len(result.images),
        batches=result.batches,
    )
    settings = " ".join(
        f"{name}={cache[name]}" for name in ("interval", "depth", "branch", "threshold") if cache.get(name) is not None
    )
    _log.info(
        "cache strategy=%s model=%s computed=%d reused=%d hit_rate=%.2f %s images=%d size=%dx%d steps=%d "
        "queue_seconds=%.3f denoise_seconds=%.3f total_seconds=%.3f",
        use.strategy,
        use.model,
        use.computed,
        use.reused,
        hit_rate(use.computed, use.reused),
        settings or "uncached",
        len(result.images),
        params.width,
        params.height,
        params.steps,
        handle.queue_seconds,
        result.timings.denoise_seconds,
        handle.total_seconds,
    )


def _count(cache: CacheSummary, key: str) -> int:
    value = cache.get(key)
    return value if isinstance(value, int) else 0


def _json_answer(handle: JobHandle, result: JobResult) -> Response:
    pictures = [base64.b64encode(picture).decode("ascii") for picture in result.images]
    answer: dict[str, object] = {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
    answer.update(_report(handle, result))
    return JSONResponse(answer)


def _report(handle: JobHandle, result: JobResult) -> dict[str, object]:
    params, timings = handle.job.params, result.timings
    return {
        "request_id": handle.job.id,
        "model": handle.job.model,
        "seeds": list(params.seeds),
        "width": params.width,
        "height": params.height,
        "steps": params.steps,
        "warnings": list(dict.fromkeys([*handle.job.warnings, *result.warnings])),
        "timings": {
            "queue_seconds": round(handle.queue_seconds, 4),
            "text_seconds": round(timings.text_seconds, 4),
            "denoise_seconds": round(timings.denoise_seconds, 4),
            "decode_seconds": round(timings.decode_seconds, 4),
            "total_seconds": round(handle.total_seconds, 4),
        },
        "cache": dict(result.cache),
    }


def _bytes_answer(handle: JobHandle, result: JobResult) -> Response:
    headers: dict[str, str] = {}
    for key, value in _report(handle, result).items():
        if isinstance(value, dict) and key in ("cache", "timings"):
            headers.update({_header(key if key == "cache" else "", name): _plain(item) for name, item in value.items()})
        else:
            headers[_header("", key)] = _plain(value)
    return Response(result.images[0], media_type=f"image/{handle.job.output_format}", headers=headers)


def _header(group: str, name: str) -> str:
    return "-".join(["X-WaveSpeed", *(word.capitalize() for word in f"{group}_{name}".split("_") if word)])


def _plain(value: object) -> str:
    """Headers are ASCII: text as it is where it can be, everything else as JSON."""
    if isinstance(value, str) and value.isascii() and value.isprintable():
        return value
    return json.dumps(value)
