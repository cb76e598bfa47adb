"""POST /api/generate: one request, one answer, nothing left running when the client goes."""

from __future__ import annotations

import asyncio
import json
import logging
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from app.api import outcome
from app.api.accept import accepted_image
from app.api.answers import GenerateAnswer, errors
from app.api.body import read_object
from app.api.resolve import Limits, resolve_aside
from app.api.schemas import EXAMPLE, GenerateRequest, parse
from app.api.service import request_id_of, service_of
from app.engine.base import Engine, JobHandle, JobResult, OutputFormat
from app.errors import Cancelled, Incompatible, ServiceError

_log = logging.getLogger(__name__)

router = APIRouter(tags=["generate"])
_BYTES = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/GenerateRequest"},
                "examples": {"document": {"summary": "A misty forest, DeepCache balanced", "value": EXAMPLE}},
            }
        },
    }
}


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
    openapi_extra=REQUEST_BODY,
)
async def generate(request: Request) -> Response:
    service = service_of(request)
    model: str | None = None
    try:
        fields = parse(await read_object(request, service.settings))
        as_bytes = _picture_format(request, fields)
        limits = Limits.of(service.settings)
        output_format = as_bytes or fields.output_format
        job = await resolve_aside(fields, service.engine.catalogue(), limits, request_id_of(request), output_format)
        model = job.model
        logs_steps = _log.isEnabledFor(logging.DEBUG)
        handle = service.engine.submit(job, partial(outcome.stepped, job) if logs_steps else None)
        result = await _result(request, service.engine, handle)
    except ServiceError as error:
        outcome.refused(service.metrics, model, error)
        raise
    except asyncio.CancelledError:
        service.metrics.answered(model, Cancelled.type)
        raise
    except Exception:  # a bug of ours is an answer as well, and counted; the middleware writes it
        service.metrics.answered(model, ServiceError.type)
        raise
    outcome.done(service.metrics, handle, result)
    if as_bytes:
        return _bytes_answer(handle, result)
    return await asyncio.to_thread(_json_answer, handle, result)


def _json_answer(handle: JobHandle, result: JobResult) -> Response:
    return JSONResponse(outcome.answer(handle, result))


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


def _bytes_answer(handle: JobHandle, result: JobResult) -> Response:
    headers: dict[str, str] = {}
    for key, value in outcome.report(handle, result).items():
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
