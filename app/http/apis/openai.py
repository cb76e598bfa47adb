"""POST /v1/images/generations, GET /v1/models. Every field of our own is taken beside theirs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from app import images
from app.engine.types import Engine, Job, JobHandle, JobResult, OutputFormat
from app.errors import Invalid, ModelNotFound, ServiceError
from app.http import outcome
from app.http.attempt import Attempt
from app.http.render import ImagesAnswer, ModelCard, ModelCards, errors
from app.http.request import service_of
from app.http.resolve import pick_model
from app.http.schemas import KNOWN, GenerateRequest, Neutral, parse, request_schema, shown, validated, without_neutral
from models.base import Step

EXAMPLE = {
    "model": "tiny-sd",
    "prompt": "a misty forest at twilight",
    "size": "768x512",
    "deepcache_enabled": True,
    "deepcache_interval": 3,
}
NEUTRAL = {
    "response_format": Neutral(("b64_json",), "No picture is kept under an address: read data[].b64_json."),
    "quality": Neutral(("auto", "standard"), "Set steps, and leave the caches off for the best picture."),
    "style": Neutral(("vivid",), "Say it in the prompt."),
    "background": Neutral(("auto", "opaque"), "Pictures here are opaque."),
    "moderation": Neutral(("auto", "low"), "Nothing is moderated here."),
    "output_compression": Neutral((100,), "jpeg and webp are written at quality 95."),
    "complexity": Neutral((), "Leave it out."),
    "frame_count": Neutral((), "Leave it out; pictures here do not move."),
    "frame_duration_ms": Neutral((), "Leave it out; pictures here do not move."),
    "svg": Neutral((), "Leave it out; pictures here are png, jpeg or webp."),
    "enable_preview": Neutral((False,), "Set stream and partial_images."),
}
_REPLACED = {"num_images": "n"}
_Word = Annotated[str, Field(max_length=200)]


class ImageOptions(BaseModel):
    """What the images API names otherwise than we do."""

    model_config = ConfigDict(strict=True, extra="forbid")

    n: int | None = Field(None, ge=1, le=10, description="How many pictures; number i is drawn from seed + i.")
    size: str | None = Field(
        None,
        max_length=20,
        description="WIDTHxHEIGHT in pixels, as width and height; auto, the default, is the model's own size.",
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="With stream: how many small pictures to send on the way."
    )
    user: _Word | None = Field(None, description="Taken and not read.")
    safety_identifier: _Word | None = Field(None, description="Taken and not read.")

    @property
    def partials(self) -> int:
        return self.partial_images or 0


router = APIRouter(prefix="/v1", tags=["openai"])


@router.post(
    "/images/generations",
    summary="Draw pictures, as the OpenAI images API does",
    response_model=ImagesAnswer,
    responses={
        200: {
            "description": "The pictures and the report; with `stream`, events `image_generation.partial_image` and "
            "`image_generation.completed`, one a picture, whose last one carries the report; or one `error`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **errors(401, 404, 413, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/ImagesRequest"},
                    "examples": {"cached": {"summary": "A misty forest, DeepCache", "value": EXAMPLE}},
                }
            },
        }
    },
)
async def generations(request: Request) -> Response:
    """All fields of POST /api/generate can stand beside these: through a client's `extra_body`."""
    attempt = Attempt(request)
    with attempt.counted():
        options, fields = read_images(await attempt.body(), attempt.service.engine)
        job = await attempt.job(fields)
        if options.stream:
            return await streamed(attempt, job, options.partials)
        handle = attempt.submit(job)
        result = await attempt.result(handle)
    return JSONResponse(await asyncio.to_thread(answer, handle, result))


@router.get("/models", summary="The models, as the OpenAI API lists them", responses=errors(401, 503))
async def models(request: Request) -> ModelCards:
    """Shorter than GET /api/models."""
    service = service_of(request)
    created = int(service.metrics.started)
    return ModelCards(data=[ModelCard(id=name, created=created) for name in service.engine.catalogue().models])


@router.get("/models/{model}", summary="One model", responses=errors(401, 404, 422, 503))
async def model(request: Request, model: str) -> ModelCard:
    """`created` is when the server started."""
    service = service_of(request)
    known = service.engine.catalogue().models
    if model not in known:
        raise ModelNotFound(f"There is no model {shown(model)!r}. There is: {', '.join(known)}.", field="model")
    return ModelCard(id=model, created=int(service.metrics.started))


def read_images(body: dict[str, Any], engine: Engine) -> tuple[ImageOptions, GenerateRequest]:
    """Raises Invalid, Unsupported, ModelNotFound; NotReady where the size is the model's and no model is known yet."""
    for ours, theirs in _REPLACED.items():
        if ours in body:
            raise Invalid(f"{ours} is called {theirs} here.", field=ours)
    body = without_neutral(body, NEUTRAL)
    options = validated(ImageOptions, {name: body.pop(name) for name in ImageOptions.model_fields if name in body})
    if options.partials and not options.stream:
        raise Invalid("partial_images are sent on a stream: set stream to true.", field="partial_images")
    if body.get("output_format", "") is None:
        del body["output_format"]
    size = _size(options.size)
    for name, pixels in size.items():
        if name in body:
            raise Invalid(f"size says {name} already; give one of them.", field=name)
        body[name] = pixels
    known = (*KNOWN, *ImageOptions.model_fields, *NEUTRAL)
    fields = parse({**body, "num_images": options.n or 1, "enable_preview": options.partials > 0}, known)
    if not {"width", "height"} & fields.model_fields_set:
        width, height = pick_model(fields, engine.catalogue()).native_size
        fields = fields.model_copy(update={"width": width, "height": height})
    return options, fields


def _size(text: str | None) -> dict[str, int]:
    if text is None or text == "auto":
        return {}
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if match is None:
        raise Invalid(f"size {shown(text)!r} is not WIDTHxHEIGHT, such as 768x512, or auto.", field="size")
    return {"width": int(match[1]), "height": int(match[2])}


def images_schema() -> dict[str, Any]:
    """JSON Schema of the body, for OpenAPI."""
    ours = request_schema()
    ours.pop("$defs", None)
    for name in _REPLACED:
        del ours["properties"][name]
    theirs = ImageOptions.model_json_schema()["properties"]
    neutral = {name: field.schema() for name, field in NEUTRAL.items()}
    properties = {**ours["properties"], **theirs, **neutral}
    return {**ours, "title": "ImagesRequest", "properties": properties, "examples": [EXAMPLE]}


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
