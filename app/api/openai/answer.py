"""What the images API answers: pictures and the report at once, or as server-sent events while they are drawn."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from fastapi.sse import format_sse_event
from PIL import Image
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app import images
from app.api import outcome
from app.api.attempt import Attempt
from app.engine.base import Job, JobHandle, JobResult, OutputFormat
from app.errors import ServiceError
from models.base import Step

SILENCE = 2.0  # seconds, after which a stream says that it is alive
_ALIVE = format_sse_event(comment="drawing")
# No token is counted here, but the events of the images API have a usage.
_USAGE: dict[str, object] = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def answer(handle: JobHandle, result: JobResult) -> dict[str, object]:
    """`ImagesAnswer` as a dict. Its size makes it a thread's work."""
    pictures = [{"b64_json": base64.b64encode(picture).decode("ascii")} for picture in result.images]
    return {"created": int(time.time()), "data": pictures, **_form(handle), **outcome.report(handle, result)}


async def streamed(attempt: Attempt, job: Job, partials: int) -> StreamingResponse:
    """The job, submitted, and the answer that tells of it. Raises what the engine refuses with."""
    steps: asyncio.Queue[Step | None] = asyncio.Queue()
    handle = attempt.submit(job, steps.put_nowait)
    handle.result.add_done_callback(lambda _: steps.put_nowait(None))
    events = _events(attempt, handle, steps, partials)
    await anext(events)  # from here on it gives the job up when it is closed
    return _Events(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


class _Events(StreamingResponse):
    """Closes its events when it ends, also when it ends before it began to send them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]  # given as a generator
            await super().__call__(scope, receive, send)


async def _events(
    attempt: Attempt, handle: JobHandle, steps: asyncio.Queue[Step | None], partials: int
) -> AsyncGenerator[bytes, None]:
    """The stream of one job; a comment first, and one whenever there was nothing to say for a while."""
    try:
        with attempt.counted():
            yield _ALIVE
            sent = 0
            while True:
                try:
                    step = await asyncio.wait_for(steps.get(), SILENCE)
                except TimeoutError:
                    yield _ALIVE
                    continue
                if step is None:
                    break
                if step.preview is not None and sent < partials and _due(step, sent, partials):
                    picture = await asyncio.to_thread(_converted, step.preview, handle.job.output_format)
                    yield _event("partial_image", {"partial_image_index": sent, **_picture(handle, picture)})
                    sent += 1
            result = attempt.done(handle)
        for event in await asyncio.to_thread(list, _completed(handle, result)):
            yield event
    except ServiceError as error:
        data = json.dumps({"type": "error", **error.body(handle.job.id)})
        yield format_sse_event(data_str=data, event="error")
    finally:
        attempt.give_up(handle)


def _due(step: Step, sent: int, partials: int) -> bool:
    """Spread evenly over the run, whose previews come at steps of their own."""
    return (step.index + 1) * (partials + 1) >= (sent + 1) * step.total


def _completed(handle: JobHandle, result: JobResult) -> Iterator[bytes]:
    for number, picture in enumerate(result.images, start=1):
        report = outcome.report(handle, result) if number == len(result.images) else {}
        yield _event("completed", {**_picture(handle, picture), "usage": _USAGE, **report})


def _form(handle: JobHandle) -> dict[str, object]:
    params = handle.job.params
    size = f"{params.width}x{params.height}"
    return {"size": size, "output_format": handle.job.output_format, "background": "opaque"}


def _picture(handle: JobHandle, picture: bytes) -> dict[str, object]:
    text = base64.b64encode(picture).decode("ascii")
    return {"b64_json": text, "created_at": int(time.time()), "quality": "auto", **_form(handle)}


def _converted(preview: bytes, output_format: OutputFormat) -> bytes:
    """From the JPEG that a worker sends to what the client asked for."""
    return preview if output_format == "jpeg" else images.encode(Image.open(io.BytesIO(preview)), output_format)


def _event(name: str, data: dict[str, object]) -> bytes:
    kind = f"image_generation.{name}"
    return format_sse_event(data_str=json.dumps({"type": kind, **data}), event=kind)
