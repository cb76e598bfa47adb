"""/api/jobs: the same request as POST /api/generate, asynchronously; results are fetched, progress is streamed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.responses import JSONResponse

from app.engine.types import Engine, Job, JobHandle, JobResult
from app.errors import Invalid, ServiceError
from app.http import outcome
from app.http.apis.generate import REQUEST_BODY
from app.http.render import JobAnswer, errors
from app.http.request import read_object, request_id_of, service_of
from app.http.resolve import Limits, resolve_aside
from app.http.schemas import parse
from app.jobs.jobs import Hooks, JobBoard, Keeping
from app.jobs.record import JobRecord
from app.metrics import Metrics
from app.settings import Settings

router = APIRouter(tags=["jobs"])
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


def board(settings: Settings, engine: Engine, metrics: Metrics) -> JobBoard:
    """The jobs of one app."""

    async def resolved(body: Mapping[str, Any], job_id: str) -> Job:
        fields = parse(dict(body))
        return await resolve_aside(fields, engine.catalogue(), Limits.of(settings), job_id, fields.output_format)

    def render(handle: JobHandle, result: JobResult) -> bytes:
        return json.dumps(outcome.answer(handle, result)).encode()

    def ended(handle: JobHandle, result: JobResult | ServiceError) -> None:
        if isinstance(result, ServiceError):
            outcome.refused(metrics, handle.job.model, result, handle)
        else:
            outcome.done(metrics, handle, result, awaited=False)

    keeping = Keeping(
        seconds=settings.result_seconds,
        result_bytes=settings.result_bytes,
        folder=settings.jobs_folder,
        requeue=settings.jobs_restart == "requeue",
    )
    return JobBoard(engine, Hooks(resolve=resolved, render=render, ended=ended, stepped=outcome.stepped), keeping)


@router.post(
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
    model: str | None = None
    try:
        key = _scoped(request, idempotency_key)
        body = await read_object(request, service.settings)
        fields = parse(body)
        limits = Limits.of(service.settings)
        catalogue = service.engine.catalogue()
        job = await resolve_aside(fields, catalogue, limits, request_id_of(request), fields.output_format)
        model = job.model
        fingerprint = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        record = await service.jobs.submit(job, body, key, fingerprint)
    except ServiceError as error:
        outcome.refused(service.metrics, model, error)
        raise
    return JSONResponse(record.shown(), status_code=202, headers={"Location": f"/api/jobs/{record.id}"})


def _find(request: Request, job_id: str) -> JobRecord:
    return service_of(request).jobs.get(job_id)


Found = Annotated[JobRecord, Depends(_find)]


@router.get(
    "/api/jobs/{job_id}",
    summary="How far a job is, and its pictures when it is done",
    response_model=JobAnswer,
    responses=errors(401, 404, 422),
)
async def look(request: Request, record: Found) -> Response:
    """`result` is what POST /api/generate would have answered, `error` what it would have answered instead."""
    result = await service_of(request).jobs.result(record)
    return Response(_with_result(record, result), media_type="application/json")


@router.delete(
    "/api/jobs/{job_id}", summary="Cancel a job", response_model=JobAnswer, responses=errors(401, 404, 409, 422)
)
async def cancel(request: Request, job_id: str) -> Response:
    """A waiting job is gone at once, a running one leaves its worker at the next step. Twice is as good as once."""
    record = await service_of(request).jobs.cancel(job_id)
    return JSONResponse(record.shown())


@router.get(
    "/api/jobs/{job_id}/events",
    summary="What happens to a job, as server-sent events",
    response_class=EventSourceResponse,
    responses=errors(401, 404, 422),
)
async def events(record: Found, last_event_id: LastEventId = None) -> AsyncIterator[ServerSentEvent]:
    """`queued` (position), `running`, `progress` (step, total, decision), `preview`, and one `done` or `error` at the
    end, with which the stream closes. Each has an id, by which a client that lost the connection comes back.
    """
    async for event in record.events.follow(_number(last_event_id)):
        yield ServerSentEvent(data=dict(event.data), event=event.name, id=str(event.number))


def _number(last_event_id: str | None) -> int:
    """Something that is no id of ours is no reason to refuse: the events are sent from the first one on."""
    return int(last_event_id) if last_event_id and re.fullmatch("[0-9]{1,9}", last_event_id) else 0


def _scoped(request: Request, key: str | None) -> str | None:
    """A key means something among the requests of one client, that is of one API key; only its hash is kept."""
    if key is None:
        return None
    key = key.strip()
    if not key or len(key) > LONGEST_KEY or not (key.isascii() and key.isprintable()):
        raise Invalid(
            f"Idempotency-Key must be 1 to {LONGEST_KEY} printable ASCII characters.", field="Idempotency-Key"
        )
    if len(key) > 2 and key[0] == key[-1] == '"':  # the draft's form, a structured field's string
        key = key[1:-1]
    client = request.headers.get("authorization", "")
    return hashlib.sha256(f"{client}\n{key}".encode()).hexdigest()


def _with_result(record: JobRecord, result: bytes | None) -> bytes:
    """The result is JSON already, and long."""
    shown = json.dumps({**record.shown(), "result": None}).encode()
    return shown if result is None else shown.removesuffix(b"null}") + result + b"}"
