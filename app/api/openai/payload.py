"""The images API's body → our request: what asks for nothing is taken, what would change nothing is refused."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from app.api.neutral import Neutral, without_neutral
from app.api.resolve import pick_model
from app.api.schemas import KNOWN, GenerateRequest, parse, request_schema, shown, validated
from app.engine.base import Engine
from app.errors import Invalid

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
