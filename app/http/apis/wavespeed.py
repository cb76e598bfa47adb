"""Our own API. POST /api/generate: one request, one answer, nothing left running when the client goes. /api/jobs: the
same request asynchronously; results are fetched, progress is streamed.

And what else LightDiffusion-Next's clients ask under /api: routes of its server.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from app.errors import Incompatible, Invalid
from app.http.render import (
    IMAGE_BODY,
    GenerateAnswer,
    JobAnswer,
    JobsAnswer,
    accepted_image,
    bytes_answer,
    errors,
    json_body,
)
from app.http.request import asked, interrupted, owner_of, repeated, request_id_of, service_of, texts_of, waited
from app.http.resolve import Adapters
from app.http.schemas import EXAMPLE, GenerateRequest, parse
from app.images import OutputFormat
from app.infotext import drawn_with, fields_of
from app.jobs.record import JobRecord

API = "generate"
drawing = APIRouter(tags=["generate"])
later = APIRouter(tags=["jobs"])
_BYTES = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY = json_body("GenerateRequest", "A misty forest, DeepCache balanced", EXAMPLE)
LONGEST_KEY = 255
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="A word of the client's own, such as a UUID. Sent again with the same body it gets the same job; "
        "with another body it is refused (422).",
    ),
]
LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", description="The id of the last event seen; the later ones are sent.")
]


@drawing.post(
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


@drawing.post("/api/interrupt", summary="Give the caller's oldest request up", responses=errors(401))
async def interrupt(request: Request) -> dict[str, str]:
    """Of those that wait for POST /api/generate: it is answered 409. A job is cancelled by DELETE /api/jobs/{id}."""
    interrupted(request, API)
    return {"status": "interrupted"}


@drawing.get("/api/controlnets", summary="The ControlNets that control can name", responses=errors(401))
def controlnets(request: Request) -> dict[str, list[str]]:
    """Also in GET /api/adapters. Whether one fits a model is seen when it is used."""
    return {"models": list(Adapters(service_of(request).settings).controlnets.files())}


@drawing.post(
    "/api/images/metadata",
    summary="What a PNG was drawn with",
    responses=errors(401, 413, 422),
    openapi_extra=IMAGE_BODY,
)
async def metadata(request: Request) -> dict[str, dict[str, Any]]:
    """`metadata` by the names of LightDiffusion-Next; `fields` as a request here has them, so that sent again they draw
    the picture again, as far as it tells. Of pictures drawn here or by AUTOMATIC1111; of others both are empty.
    """
    found = drawn_with(await texts_of(request))
    same = ("prompt", "negative_prompt", "seed", "steps", "sampler", "scheduler", "width", "height")
    names = {**dict(zip(same, same, strict=True)), "cfg_scale": "guidance_scale", "model_path": "model"}
    return {
        "metadata": {theirs: found[ours] for theirs, ours in names.items() if ours in found},
        "fields": fields_of(found),
    }


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


@later.post(
    "/api/jobs",
    status_code=202,
    summary="Draw pictures, later",
    response_model=JobAnswer,
    responses=errors(401, 404, 413, 422, 429, 503),
    openapi_extra=REQUEST_BODY,
)
async def submit(request: Request, idempotency_key: IdempotencyKey = None) -> Response:
    """The answer comes before the pictures: `Location` is where the job is asked for."""
    service = service_of(request)
    async with asked(request) as body:
        key = _scoped(request, idempotency_key)
        whole = repeated(request, body)
        job = await service.resolver.job(parse(whole), request_id_of(request))
        fingerprint = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    record = await service.jobs.submit(job, owner_of(request), request=whole, key=key, fingerprint=fingerprint)
    return JSONResponse(record.shown(), status_code=202, headers={"Location": f"/api/jobs/{record.id}"})


def _find(request: Request, job_id: str) -> JobRecord:
    return service_of(request).jobs.get(job_id, owner_of(request))


Found = Annotated[JobRecord, Depends(_find)]


def _unseen(record: Found, last_event_id: LastEventId = None) -> int:
    """The number of the last event that the client has seen; what is no id of ours is no reason to refuse: it is 0."""
    number = int(last_event_id) if last_event_id and re.fullmatch("[0-9]{1,9}", last_event_id) else 0
    if record.events.ended and number >= record.events.last:
        raise HTTPException(204)
    return number


Unseen = Annotated[int, Depends(_unseen)]


@later.get("/api/jobs", summary="The caller's jobs", response_model=JobsAnswer, responses=errors(401, 422))
async def jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=200, description="At most so many.")] = 50,
    before: Annotated[str | None, Query(description="The id of a job: older ones than it alone.")] = None,
) -> Response:
    """The newest first, without their results; `more` says whether there are older ones."""
    kept = service_of(request).jobs.kept(owner_of(request))
    if before is not None:
        kept = itertools.dropwhile(lambda record: record.id != before, kept)
        next(kept, None)
    found = list(itertools.islice(kept, limit + 1))
    return JSONResponse({"jobs": [record.shown() for record in found[:limit]], "more": len(found) > limit})


@later.get(
    "/api/jobs/{job_id}",
    summary="How far a job is, and its pictures when it is done",
    response_model=JobAnswer,
    responses=errors(401, 404, 422),
)
async def look(request: Request, record: Found) -> Response:
    """`result` is what POST /api/generate would have answered, `error` what it would have answered instead."""
    result = await service_of(request).jobs.result(record)
    return Response(_with_result(record, result), media_type="application/json")


@later.delete(
    "/api/jobs/{job_id}", summary="Cancel a job", response_model=JobAnswer, responses=errors(401, 404, 409, 422)
)
async def cancel(request: Request, record: Found) -> Response:
    """A waiting job is gone at once, a running one leaves its worker at the next step. Twice is as good as once."""
    await service_of(request).jobs.cancel(record)
    return JSONResponse(record.shown())


@later.delete(
    "/api/jobs/{job_id}/result",
    status_code=204,
    summary="Forget a job and its pictures",
    responses=errors(401, 404, 422),
)
async def forget(request: Request, record: Found) -> None:
    """For good. One that is under way is cancelled first."""
    await service_of(request).jobs.forget(record)


@later.get(
    "/api/jobs/{job_id}/events",
    summary="What happens to a job, as server-sent events",
    response_class=EventSourceResponse,
    responses={204: {"description": "The client has seen the end."}, **errors(401, 404, 422)},
)
async def events(record: Found, after: Unseen) -> AsyncIterator[ServerSentEvent]:
    """`queued` (position), `running`, `progress` (step, total, decision), `preview`, and one `done` or `error` at the
    end, with which the stream closes. Each has an id, by which a client that lost the connection comes back; 204 tells
    a client that has seen the end not to come again.
    """
    async for event in record.events.follow(after):
        yield ServerSentEvent(data=dict(event.data), event=event.name, id=str(event.number))


def _scoped(request: Request, key: str | None) -> str | None:
    """A key means something among the requests of one owner; only its hash is kept."""
    if key is None:
        return None
    key = key.strip()
    if not key or len(key) > LONGEST_KEY or not (key.isascii() and key.isprintable()):
        raise Invalid(
            f"Idempotency-Key must be 1 to {LONGEST_KEY} printable ASCII characters.", field="Idempotency-Key"
        )
    if len(key) > 2 and key[0] == key[-1] == '"':  # the draft's form, a structured field's string
        key = key[1:-1]
    return hashlib.sha256(f"{owner_of(request)}\n{key}".encode()).hexdigest()


def _with_result(record: JobRecord, result: bytes | None) -> bytes:
    """The result is JSON already, and long."""
    shown = json.dumps({**record.shown(), "result": None}).encode()
    return shown if result is None else shown.removesuffix(b"null}") + result + b"}"


router = APIRouter()
router.include_router(drawing)
router.include_router(later)
