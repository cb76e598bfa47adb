"""The pictures that a request brings: what is drawn over, and where. Decoding takes up to seconds each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from app.errors import Invalid
from app.http.schemas import GenerateRequest
from app.images import read_mask, read_picture
from models.base import Control, Img2Img, Inpaint
from models.limits import fit
from models.masks import PAINTED, everything, extended, hard

SMALLEST_PICTURE = 32  # pixels a side of an upload, and of what is left of it beside a border
MOST_PIXELS = 2**24  # of one
_BORDER = ("outpaint_left", "outpaint_top", "outpaint_right", "outpaint_bottom")


@dataclass(frozen=True, slots=True)
class Reading:
    """What an API means by the pictures of its request.

    field: its name for img2img_image. uncut: the fields, by our names, whose pictures are refused where they would have
    to be cut. clear_mask: the transparent pixels of the mask are drawn, where it is else the white ones.
    """

    field: str = "img2img_image"
    uncut: frozenset[str] = frozenset()
    clear_mask: bool = False


OURS = Reading()


def inpaints(request: GenerateRequest) -> bool:
    """Whether a part of the answer is drawn, and the rest is the upload."""
    return request.mask is not None or any(_border(request))


def img2img(request: GenerateRequest, steps: int, reading: Reading) -> Img2Img | None:
    """Raises Invalid and PictureTooLarge. It may take seconds: last, when all else is in order."""
    if not request.img2img_enabled:
        if inpaints(request):
            field = "mask" if request.mask is not None else next(name for name in _BORDER if getattr(request, name))
            raise Invalid(f"{field} needs a picture: set img2img_enabled, and send it in img2img_image.", field=field)
        return None
    if request.img2img_image is None:
        raise Invalid(
            "img2img_enabled needs a picture in img2img_image, as base64 or a data URL.", field="img2img_image"
        )
    if int(steps * request.img2img_denoise) < 1:
        raise Invalid(
            f"img2img_denoise {request.img2img_denoise:g} of {steps} steps leaves no step to run. "
            f"Give at least {math.ceil(1000 / steps) / 1000:g}, or more steps.",
            field="img2img_denoise",
        )
    width, height = _inner(request)
    picture = read_picture(request.img2img_image, field=reading.field, max_pixels=MOST_PIXELS)
    if min(picture.size) < SMALLEST_PICTURE:
        raise Invalid(
            f"{reading.field} has {picture.width}×{picture.height} pixels; there is nothing to draw over in less than "
            f"{SMALLEST_PICTURE} a side. Send a larger picture.",
            field=reading.field,
        )
    if "img2img_image" in reading.uncut and picture.width * height != picture.height * width:
        raise Invalid(
            f"The picture's {picture.width}×{picture.height} pixels have another aspect than "
            f"{width}×{height}. It is cut to it here: set resize_mode to 1, or send one that fits.",
            field="resize_mode",
        )
    inpaint = _inpaint(request, picture.size, (width, height), reading) if inpaints(request) else None
    # Cut and scaled here already, as the model would: what waits in the queue is no larger than what is drawn.
    start = extended(fit(picture, width, height), *_border(request))
    return Img2Img(picture=start, denoise=request.img2img_denoise, inpaint=inpaint)


def controls(request: GenerateRequest, found: Sequence[tuple[str, Path]], reading: Reading) -> tuple[Control, ...]:
    """The request's, of the ControlNets `found` by name. Raises Invalid and PictureTooLarge, as late as img2img."""
    made = []
    for index, (control, (name, path)) in enumerate(zip(request.control, found, strict=True)):
        field, (width, height) = f"control.{index}.image", (request.width, request.height)
        picture = read_picture(control.image, field=field, max_pixels=MOST_PIXELS)
        if field in reading.uncut and picture.width * height != picture.height * width:
            raise Invalid(
                f"{field} has {picture.width}×{picture.height} pixels, another aspect than {width}×{height}. It is cut "
                "to it here: set the unit's resize_mode to 1 (Crop and Resize), or send one that fits.",
                field=field,
            )
        # As the picture of img2img is.
        image = fit(picture, width, height)
        settings = control.model_dump(include={"weight", "start", "end", "edges"})
        made.append(Control(name=name, path=path, image=image, **settings))
    return tuple(made)


def _border(request: GenerateRequest) -> tuple[int, int, int, int]:
    """Pixels that are drawn on the left of the upload, above it, on its right and below."""
    left, top, right, bottom = (int(getattr(request, name)) for name in _BORDER)
    return left, top, right, bottom


def _inner(request: GenerateRequest) -> tuple[int, int]:
    """Pixels, (width, height), that the border leaves to the upload. Raises Invalid."""
    left, top, right, bottom = _border(request)
    width, height = request.width - left - right, request.height - top - bottom
    for side, names, kept in (("width", _BORDER[::2], width), ("height", _BORDER[1::2], height)):
        if kept < SMALLEST_PICTURE:
            raise Invalid(
                f"The border leaves {max(0, kept)} pixels of the {side} to the picture, and it needs "
                f"{SMALLEST_PICTURE}. The {side} is the answer's, border included: ask for a larger one, or a smaller "
                "border.",
                field=next(name for name in names if getattr(request, name)),
            )
    return width, height


def _inpaint(request: GenerateRequest, picture: tuple[int, int], inner: tuple[int, int], reading: Reading) -> Inpaint:
    """picture: the upload's size. inner: what it is scaled to."""
    if request.mask is None:
        mask = Image.new("L", inner)
    else:
        mask = read_mask(request.mask, field="mask", max_pixels=MOST_PIXELS, clear=reading.clear_mask)
        if not _same_aspect(mask.size, picture):
            raise Invalid(
                f"The mask's {mask.width}×{mask.height} pixels are of another aspect than {reading.field} with "
                f"{picture[0]}×{picture[1]}: which are meant? Send a mask of the picture's size.",
                field="mask",
            )
        mask = fit(mask, *inner)
    framed = everything((request.width, request.height))
    framed.paste(mask, _border(request)[:2])
    if hard(framed).getbbox() is None:
        kind = "is half transparent" if reading.clear_mask else f"has {PAINTED} of 255"
        drawn = "What is transparent" if reading.clear_mask else "White"
        raise Invalid(
            f"The mask leaves nothing to draw: no pixel of it, as it is cut to {request.width}×{request.height}, "
            f"{kind} or more. {drawn} is drawn anew, the rest is kept.",
            field="mask",
        )
    padding = request.inpaint_padding if request.inpaint_area == "masked" else None
    return Inpaint(mask=framed, blur=request.mask_blur, fill=request.mask_fill, padding=padding)


def _same_aspect(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """To within a pixel of the smaller picture: what scaling a picture rounds to."""
    small, large = sorted((one, other))
    return abs(large[0] * small[1] - large[1] * small[0]) <= max(large)
