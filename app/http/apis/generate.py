"""POST /api/generate: one request, one answer, nothing left running when the client goes."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from app.errors import Incompatible
from app.http.render import GenerateAnswer, accepted_image, bytes_answer, errors, json_body
from app.http.request import asked, owner_of, request_id_of, service_of, waited
from app.http.schemas import EXAMPLE, GenerateRequest, parse
from app.images import OutputFormat
from app.jobs.record import JobRecord

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
        fields = parse(body)
        if (wanted := _picture_format(request, fields)) is not None:
            fields = fields.model_copy(update={"output_format": wanted})
        job = await service.resolver.job(fields, request_id_of(request))
    record = await service.jobs.submit(job, owner_of(request), ephemeral=True, heard=False)
    return record, wanted is not None


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
