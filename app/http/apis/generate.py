"""POST /api/generate: one request, one answer, nothing left running when the client goes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from app.engine.types import JobHandle, JobResult, OutputFormat
from app.errors import Incompatible
from app.http import outcome
from app.http.attempt import Attempt
from app.http.render import GenerateAnswer, accepted_image, errors
from app.http.schemas import EXAMPLE, GenerateRequest, parse

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
    attempt = Attempt(request)
    with attempt.counted():
        fields = parse(await attempt.body())
        as_bytes = _picture_format(request, fields)
        handle = attempt.submit(await attempt.job(fields, as_bytes))
        result = await attempt.result(handle)
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
