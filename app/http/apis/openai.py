"""POST /v1/images/generations, GET /v1/models. Every field of our own is taken beside theirs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from app import images
from app.engine.types import Engine, Job
from app.errors import Invalid, ServiceError, shown
from app.http.foreign import Foreign, translated, whole_numbers
from app.http.render import ImagesAnswer, ModelCard, ModelCards, errors, json_body
from app.http.request import asked, owner_of, request_id_of, service_of, waited
from app.http.resolve import pick_model, served
from app.http.schemas import KNOWN, GenerateRequest, parse, request_schema, validated
from app.images import OutputFormat
from app.jobs.jobs import Jobs
from app.jobs.record import Drawn, JobRecord, spaced

EXAMPLE = {
    "model": "tiny-sd",
    "prompt": "a misty forest at twilight",
    "size": "768x512",
    "deepcache_enabled": True,
    "deepcache_interval": 3,
}
FOREIGN = {
    "quality": Foreign(
        ("auto", "standard"), "Pictures have one quality: set steps.", ignored=("low", "medium", "high", "hd")
    ),
    "style": Foreign(("vivid",), "Say it in the prompt.", ignored=("natural",)),
    "background": Foreign(("auto", "opaque"), "Pictures here are opaque."),
    "moderation": Foreign(("auto", "low"), "Nothing is moderated here."),
    "output_compression": Foreign((100,), "jpeg and webp are written at quality 95."),
    "complexity": Foreign((), "Leave it out."),
    "frame_count": Foreign((), "Leave it out; pictures here do not move."),
    "frame_duration_ms": Foreign((), "Leave it out; pictures here do not move."),
    "svg": Foreign((), "Leave it out; pictures here are png, jpeg or webp."),
    "enable_preview": Foreign((False,), "Set stream and partial_images."),
}
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
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url answers a data: URL, which holds the picture: none is kept under an address."
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
    openapi_extra=json_body("ImagesRequest", "A misty forest, DeepCache", EXAMPLE),
)
async def generations(request: Request) -> Response:
    """All fields of POST /api/generate can stand beside these: through a client's `extra_body`."""
    options, record, job = await _submitted(request)
    if options.stream:
        events = _events(service_of(request).jobs, record, job, options.partials)
        await anext(events)  # from here on it gives the job up when it is closed
        return _Events(events, headers={"X-Accel-Buffering": "no"})
    drawn = await waited(request, record)
    return await asyncio.to_thread(lambda: JSONResponse(_answer(drawn, options.response_format)))


async def _submitted(request: Request) -> tuple[ImageOptions, JobRecord, Job]:
    service = service_of(request)
    async with asked(request) as body:
        options, fields = read_images(body, service.engine)
        job = await service.resolver.job(fields, request_id_of(request))
    record = await service.jobs.submit(job, owner_of(request), ephemeral=True, heard=options.partials > 0)
    return options, record, job


@router.get("/models", summary="The models, as the OpenAI API lists them", responses=errors(401, 503))
async def models(request: Request) -> ModelCards:
    """Shorter than GET /api/models."""
    service = service_of(request)
    created = int(service.metrics.started)
    return ModelCards(data=[ModelCard(id=name, created=created) for name in service.engine.catalogue().models])


@router.get("/models/{model:path}", summary="One model", responses=errors(401, 404, 422, 503))
async def model(request: Request, model: str) -> ModelCard:
    """`created` is when the server started."""
    service = service_of(request)
    served(model, service.engine.catalogue())
    return ModelCard(id=model, created=int(service.metrics.started))


def read_images(body: dict[str, Any], engine: Engine) -> tuple[ImageOptions, GenerateRequest]:
    """Raises Invalid, Unsupported, ModelNotFound; NotReady where the size is the model's and no model is known yet."""
    if "num_images" in body:
        raise Invalid("num_images is called n here.", field="num_images")
    body, said = translated(whole_numbers(body), FOREIGN)
    options = validated(ImageOptions, {name: body.pop(name) for name in ImageOptions.model_fields if name in body})
    if options.partials and not options.stream:
        raise Invalid("partial_images are sent on a stream: set stream to true.", field="partial_images")
    if options.stream and options.response_format == "url":
        raise Invalid("A stream sends b64_json: leave response_format out.", field="response_format")
    if body.get("output_format", "") is None:
        del body["output_format"]
    size = _size(options.size)
    for name, pixels in size.items():
        if name in body:
            raise Invalid(f"size says {name} already; give one of them.", field=name)
        body[name] = pixels
    known = (*KNOWN, *ImageOptions.model_fields, *FOREIGN)
    fields = parse({**body, "num_images": options.n or 1, "enable_preview": options.partials > 0}, known, said)
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
    del ours["properties"]["num_images"]
    theirs = ImageOptions.model_json_schema()["properties"]
    foreign = {name: field.schema(ours["properties"]) for name, field in FOREIGN.items()}
    properties = {**ours["properties"], **theirs, **foreign}
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


def _answer(drawn: Drawn, response_format: str | None) -> dict[str, object]:
    """`ImagesAnswer` as a dict. Its size makes it a thread's work."""
    pictures = [base64.b64encode(picture).decode("ascii") for picture in drawn.images]
    head = f"data:image/{drawn.job.output_format};base64,"
    data = [{"url": head + text} if response_format == "url" else {"b64_json": text} for text in pictures]
    return {"created": int(time.time()), "data": data, **_form(drawn.drawing), **drawn.report}


class _Events(EventSourceResponse):
    """Closes its events when it ends, also when it ends before it began to send them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]  # given as a generator
            await super().__call__(scope, receive, send)


async def _events(jobs: Jobs, record: JobRecord, job: Job, partials: int) -> AsyncGenerator[bytes, None]:
    """The stream of one job; a comment first, and one whenever there was nothing to say for a while."""
    try:
        yield _ALIVE
        sent = 0
        async for event in spaced(record.events.follow(), SILENCE):
            if event is None:
                yield _ALIVE
            elif event.name == "preview" and sent < partials and _due(event.data, sent, partials):
                picture = await asyncio.to_thread(_converted, event.data["image"], job.output_format)
                yield _event("partial_image", {"partial_image_index": sent, **_picture(job, picture)})
                sent += 1
        drawn = await asyncio.shield(record.outcome)
        for line in await asyncio.to_thread(list, _completed(drawn)):
            yield line
    except ServiceError as error:
        data = json.dumps({"type": "error", **error.body(job.id)})
        yield format_sse_event(data_str=data, event="error")
    finally:
        jobs.leave(record)


def _due(preview: Mapping[str, Any], sent: int, partials: int) -> bool:
    """Spread evenly over the run, whose previews come at steps of their own."""
    return bool(preview["step"] * (partials + 1) >= (sent + 1) * preview["total"])


def _completed(drawn: Drawn) -> Iterator[bytes]:
    for number, picture in enumerate(drawn.images, start=1):
        report = drawn.report if number == len(drawn.images) else {}
        yield _event("completed", {**_picture(drawn.drawing, picture), "usage": _USAGE, **report})


def _form(job: Job) -> dict[str, object]:
    size = f"{job.params.width}x{job.params.height}"
    return {"size": size, "output_format": job.output_format, "background": "opaque"}


def _picture(job: Job, picture: bytes) -> dict[str, object]:
    text = base64.b64encode(picture).decode("ascii")
    return {"b64_json": text, "created_at": int(time.time()), "quality": "auto", **_form(job)}


def _converted(preview: str, output_format: OutputFormat) -> bytes:
    """From the JPEG that a worker sends, base64, to what the client asked for."""
    jpeg = base64.b64decode(preview)
    return jpeg if output_format == "jpeg" else images.encode(Image.open(io.BytesIO(jpeg)), output_format)


def _event(name: str, data: dict[str, object]) -> bytes:
    kind = f"image_generation.{name}"
    return format_sse_event(data_str=json.dumps({"type": kind, **data}), event=kind)
