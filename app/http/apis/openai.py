"""POST /v1/images/generations and edits, GET /v1/models. Every field of our own is taken beside theirs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from functools import cache, partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from app import images
from app.engine.types import Job, ModelInfo
from app.errors import Invalid, ServiceError, shown
from app.http.foreign import EDITS, IMAGES, Foreign, translated, whole_numbers
from app.http.pictures import MOST_PIXELS, OURS, Reading
from app.http.render import ImagesAnswer, ModelCard, ModelCards, errors, form_body, json_body, request_schema
from app.http.request import FormFile, asked, owner_of, request_id_of, service_of, waited
from app.http.resolve import pick_model, served
from app.http.schemas import KNOWN, GenerateRequest, parse, validated
from app.images import OutputFormat, read_size
from app.jobs.jobs import Jobs
from app.jobs.record import Drawn, JobRecord, spaced

EXAMPLE = {
    "model": "tiny-sd",
    "prompt": "a misty forest at twilight",
    "size": "768x512",
    "deepcache_enabled": True,
    "deepcache_interval": 3,
}
PICTURES = ("image", "image[]")  # of an edit; the latter is what clients write who have a list of one
_Word = Annotated[str, Field(max_length=200)]


class ImageOptions(BaseModel):
    """What the images API names otherwise than we do."""

    model_config = ConfigDict(strict=True, extra="forbid")

    n: int | None = Field(None, ge=1, le=10, description="How many pictures; number i is drawn from seed + i.")
    size: str | None = Field(
        None,
        max_length=20,
        description="WIDTHxHEIGHT in pixels, as width and height; auto, the default, is the model's own size, over a "
        "picture in its aspect.",
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
    return await _drawn(request, *await _submitted(request), "image_generation")


@router.post(
    "/images/edits",
    summary="Draw a picture over, whole or within a mask, as the OpenAI images API does",
    response_model=ImagesAnswer,
    responses={
        200: {
            "description": "As of generations; the events are `image_edit.partial_image` and `image_edit.completed`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **errors(401, 404, 413, 422, 429, 500, 503, 504),
    },
    openapi_extra=form_body("ImageEditRequest"),
)
async def edits(request: Request) -> Response:
    """A form (multipart/form-data) with one picture as the file `image`, and perhaps a `mask`. All fields of POST
    /api/generate can stand beside these, those that are no text as JSON.
    """
    return await _drawn(request, *await _submitted_edit(request), "image_edit")


async def _drawn(request: Request, options: ImageOptions, record: JobRecord, job: Job, kind: str) -> Response:
    if options.stream:
        events = _events(service_of(request).jobs, record, job, options.partials, kind)
        await anext(events)  # from here on it gives the job up when it is closed
        return _Events(events, headers={"X-Accel-Buffering": "no"})
    drawn = await waited(request, record)
    return await asyncio.to_thread(lambda: JSONResponse(_answer(drawn, options.response_format)))


async def _submitted(request: Request) -> tuple[ImageOptions, JobRecord, Job]:
    async with asked(request) as body:
        options, fields = read_images(body, IMAGES)
        job = await _job(request, fields)
    return options, await _record(request, options, job), job


async def _submitted_edit(request: Request) -> tuple[ImageOptions, JobRecord, Job]:
    async with asked(request, form=True) as form:
        options, fields = read_images(read_edit(form), EDITS)
        reading = Reading(field="image", clear_mask=True)
        job = await _job(request, fields, reading)
    return options, await _record(request, options, job), job


async def _job(request: Request, fields: GenerateRequest, reading: Reading = OURS) -> Job:
    """A request that names no size has the model's own, in the aspect of its picture if there is one."""
    service = service_of(request)
    if not {"width", "height"} & fields.model_fields_set:
        model = pick_model(fields, service.engine.catalogue())
        width, height = model.native_size
        if fields.img2img_enabled and (picture := fields.img2img_image) is not None:
            of = partial(read_size, picture, field=reading.field, max_pixels=MOST_PIXELS)
            width, height = _in_aspect(model, await asyncio.to_thread(of))
        fields = fields.model_copy(update={"width": width, "height": height})
    return await service.resolver.job(fields, request_id_of(request), reading)


async def _record(request: Request, options: ImageOptions, job: Job) -> JobRecord:
    jobs = service_of(request).jobs
    return await jobs.submit(job, owner_of(request), ephemeral=True, heard=options.partials > 0)


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


def read_images(body: dict[str, Any], foreign: Mapping[str, Foreign]) -> tuple[ImageOptions, GenerateRequest]:
    """Raises Invalid, Unsupported."""
    if "num_images" in body:
        raise Invalid("num_images is called n here.", field="num_images")
    body, said = translated(whole_numbers(body), foreign)
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
    known = (*KNOWN, *ImageOptions.model_fields, *foreign)
    return options, parse({**body, "num_images": options.n or 1, "enable_preview": options.partials > 0}, known, said)


def read_edit(form: Mapping[str, str | FormFile]) -> dict[str, Any]:
    """The body that a form means, as `read_images` takes it. Raises Invalid."""
    body: dict[str, Any] = {
        name: value if isinstance(value, FormFile) or name in _texts() else _value(value)
        for name, value in form.items()
        if name not in (*PICTURES, "mask")
    }
    pictures = [name for name in PICTURES if name in form]
    if len(pictures) != 1:
        raise Invalid("A form needs one picture, the file image; several are not drawn together here.", field="image")
    ours = {"img2img_enabled": True, "img2img_image": _file(form, pictures[0])}
    if "mask" in form:
        ours["mask"] = _file(form, "mask")
        body.setdefault("img2img_denoise", 1)
    for name in ours:
        if name in body:
            raise Invalid(f"{name} is said by the file image; leave it out.", field=name)
    return body | ours


def _file(form: Mapping[str, str | FormFile], name: str) -> str:
    value = form[name]
    if not isinstance(value, FormFile):
        raise Invalid(f"{name} must be a file, with a filename in its part of the form.", field=name)
    return value.base64


@cache
def _texts() -> frozenset[str]:
    """The fields whose values are text; in a form the others are JSON."""
    properties = {**request_schema()["properties"], **ImageOptions.model_json_schema()["properties"]}
    return frozenset(
        name for name, schema in properties.items() if "string" in {one.get("type") for one in _kinds(schema)}
    )


def _kinds(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [schema, *schema.get("anyOf", ())]


def _value(text: str) -> Any:
    """What is no JSON stays as it is, for the schema to refuse it by its name."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _in_aspect(model: ModelInfo, picture: tuple[int, int]) -> tuple[int, int]:
    """About as many pixels as the model's own size, next to the picture's aspect."""
    side, aspect = math.sqrt(math.prod(model.native_size)), math.sqrt(picture[0] / picture[1])
    multiple, lengths = model.size_multiple, (side * aspect, side / aspect)
    width, height = (min(2048, max(64, round(length / multiple) * multiple)) for length in lengths)
    return width, height


def _size(text: str | None) -> dict[str, int]:
    if text is None or text == "auto":
        return {}
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if match is None:
        raise Invalid(f"size {shown(text)!r} is not WIDTHxHEIGHT, such as 768x512, or auto.", field="size")
    return {"width": int(match[1]), "height": int(match[2])}


def schemas() -> dict[str, dict[str, Any]]:
    """The bodies' JSON Schemas by name, for OpenAPI."""
    ours = request_schema()
    ours.pop("$defs", None)
    known = ours["properties"]
    del known["num_images"]
    theirs = ImageOptions.model_json_schema()["properties"]
    drawn, edited = ({name: field.schema(known) for name, field in table.items()} for table in (IMAGES, EDITS))
    file = {"type": "string", "format": "binary"}
    files = {
        "image": {**file, "description": "The picture, a PNG, JPEG or WebP file. Also called image[]."},
        "mask": {**file, "description": "Of its aspect; what is transparent is drawn anew, by default from noise."},
    }
    form = {name: schema for name, schema in known.items() if not name.startswith(("img2img_image", "img2img_enabled"))}
    return {
        "ImagesRequest": {
            **ours,
            "title": "ImagesRequest",
            "properties": {**known, **theirs, **drawn},
            "examples": [EXAMPLE],
        },
        "ImageEditRequest": {
            **ours,
            "title": "ImageEditRequest",
            "properties": {**form, **theirs, **edited, **files},
            "required": ["image", "prompt"],
            "examples": [],
        },
    }


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


async def _events(jobs: Jobs, record: JobRecord, job: Job, partials: int, kind: str) -> AsyncGenerator[bytes, None]:
    """The stream of one job; a comment first, and one whenever there was nothing to say for a while."""
    try:
        yield _ALIVE
        sent = 0
        async for event in spaced(record.events.follow(), SILENCE):
            if event is None:
                yield _ALIVE
            elif event.name == "preview" and sent < partials and _due(event.data, sent, partials):
                picture = await asyncio.to_thread(_converted, event.data["image"], job.output_format)
                yield _event(f"{kind}.partial_image", {"partial_image_index": sent, **_picture(job, picture)})
                sent += 1
        drawn = await asyncio.shield(record.outcome)
        for line in await asyncio.to_thread(list, _completed(drawn, kind)):
            yield line
    except ServiceError as error:
        data = json.dumps({"type": "error", **error.body(job.id)})
        yield format_sse_event(data_str=data, event="error")
    finally:
        jobs.leave(record)


def _due(preview: Mapping[str, Any], sent: int, partials: int) -> bool:
    """Spread evenly over the run, whose previews come at steps of their own."""
    return bool(preview["step"] * (partials + 1) >= (sent + 1) * preview["total"])


def _completed(drawn: Drawn, kind: str) -> Iterator[bytes]:
    for number, picture in enumerate(drawn.images, start=1):
        report = drawn.report if number == len(drawn.images) else {}
        yield _event(f"{kind}.completed", {**_picture(drawn.drawing, picture), "usage": _USAGE, **report})


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


def _event(kind: str, data: dict[str, object]) -> bytes:
    return format_sse_event(data_str=json.dumps({"type": kind, **data}), event=kind)
