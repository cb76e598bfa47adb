"""POST /api/generate: one request, one answer, nothing left running when the client goes.

And what else LightDiffusion-Next's clients ask under /api: routes of its server.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from app.errors import Incompatible
from app.http.render import IMAGE_BODY, GenerateAnswer, accepted_image, bytes_answer, errors, json_body
from app.http.request import asked, interrupted, owner_of, repeated, request_id_of, service_of, texts_of, waited
from app.http.schemas import EXAMPLE, GenerateRequest, parse
from app.images import OutputFormat
from app.infotext import drawn_with
from app.jobs.record import JobRecord

API = "generate"
router = APIRouter(tags=["generate"])
_BYTES = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY = json_body("GenerateRequest", "A misty forest, DeepCache balanced", EXAMPLE)


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
    record, as_bytes = await _submitted(request)
    drawn = await waited(request, record)
    if as_bytes:
        return bytes_answer(drawn)
    return await asyncio.to_thread(lambda: JSONResponse(drawn.answer()))


async def _submitted(request: Request) -> tuple[JobRecord, bool]:
    """The job, and whether the answer is to be the picture itself. Nothing of the body outlives this call."""
    service = service_of(request)
    async with asked(request) as body:
        fields = parse(repeated(request, body))
        if (wanted := _picture_format(request, fields)) is not None:
            fields = fields.model_copy(update={"output_format": wanted})
        job = await service.resolver.job(fields, request_id_of(request))
    record = await service.jobs.submit(job, owner_of(request), ephemeral=True, heard=False, api=API)
    return record, wanted is not None


@router.post("/api/interrupt", summary="Give the caller's oldest request up", responses=errors(401))
async def interrupt(request: Request) -> dict[str, str]:
    """Of those that wait for POST /api/generate: it is answered 409. A job is cancelled by DELETE /api/jobs/{id}."""
    interrupted(request, API)
    return {"status": "interrupted"}


@router.get("/api/controlnets", summary="The ControlNets: none", responses=errors(401))
async def controlnets() -> dict[str, list[str]]:
    return {"models": []}


@router.post(
    "/api/images/metadata",
    summary="What a PNG was drawn with",
    responses=errors(401, 413, 422),
    openapi_extra=IMAGE_BODY,
)
async def metadata(request: Request) -> dict[str, dict[str, Any]]:
    """By the names of LightDiffusion-Next, as fields of a request; of pictures drawn here or by AUTOMATIC1111."""
    found = drawn_with(await texts_of(request))
    same = ("prompt", "negative_prompt", "seed", "steps", "sampler", "scheduler", "width", "height")
    names = {**dict(zip(same, same, strict=True)), "cfg_scale": "guidance_scale", "model_path": "model"}
    return {"metadata": {theirs: found[ours] for theirs, ours in names.items() if ours in found}}


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
