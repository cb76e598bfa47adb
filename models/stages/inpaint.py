"""A part of a client's picture drawn anew, under a mask; what the mask keeps comes back bit for bit.

The denoiser's runs keep the rest of the latents near the picture's (diffusers' inpaint pipelines; Lugmayr et al. 2022,
"RePaint", section 3.1, without its resampling). What is decoded of them is near the picture, not the picture: so it is
put back in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageFilter

from models import limits, masks
from models.base import GenerationParams, Img2Img, Inpaint

from .drawing import Drawing
from .model import Sizes
from .picture import FromPicture
from .region import Frame, Region, framed


@dataclass(frozen=True, slots=True)
class WithinMask:
    """The frame of a mask, at the request's size, drawn over within the mask. until: as of FromPicture."""

    settings: Img2Img
    inpaint: Inpaint
    until: float = 1.0

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        return FromPicture(self.settings, self.until).steps(model, params)

    def run(self, drawing: Drawing) -> None:
        inpaint, size = self.inpaint, (drawing.params.width, drawing.params.height)
        mask = limits.fit(inpaint.mask, *size)
        weights = mask.filter(ImageFilter.GaussianBlur(inpaint.blur))
        frame = (0, 0, *size) if inpaint.padding is None else close_up(mask, weights, inpaint.padding)
        drawing.region = Region(frame, weights.crop(frame))
        picture = drawing.region.cut(limits.fit(self.settings.picture, *size), size)
        drawn = masks.hard(mask).crop(frame).resize(size, Image.Resampling.NEAREST)
        drawing.mask = masks.widened(drawn, *drawing.size)
        picture = masks.widened(picture, *drawing.size).resize(drawing.size, Image.Resampling.LANCZOS)
        drawing.latents = drawing.from_pictures(
            "inpaint",
            [picture] * len(drawing.seeds),
            self.settings.denoise,
            until=self.until,
            mask=drawing.mask,
            fill=inpaint.fill,
        )


@dataclass(frozen=True, slots=True)
class PutBack:
    """What was drawn into the client's `picture`, as much of it as the mask shows."""

    picture: Image.Image

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        return 0

    def run(self, drawing: Drawing) -> None:
        with drawing.clock("decode"):
            whole = limits.fit(self.picture, drawing.params.width, drawing.params.height)
            if drawing.region is not None:
                drawing.images = [drawing.region.put_back(whole, drawn) for drawn in drawing.images]


def close_up(mask: Image.Image, weights: Image.Image, padding: int) -> Frame:
    """What a mask and its soft edge lie in, with `padding` pixels around it: of the picture's aspect, and within it."""
    size = mask.size
    box = ImageChops.lighter(mask, weights).getbbox() or (0, 0, *size)
    scale = max((end - start + 2 * padding) / side for start, end, side in zip(box[:2], box[2:], size, strict=True))
    return framed(box, (math.ceil(scale * size[0]), math.ceil(scale * size[1])), size)
