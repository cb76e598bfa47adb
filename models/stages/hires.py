"""Draw small, enlarge, refine: a small picture has one composition, and the second run gives it the detail.

What a request for a large picture gets from a model that was trained on small ones is the same motif several times
over. Drawn at half the size first and only refined at the full one, it stays one picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from models import limits
from models.base import GenerationParams
from models.upscaling import Enlarger

from .drawing import Drawing
from .model import Sizes

SCALE = 2  # at most, from the first run to the second
STRENGTH = 0.5  # of the second run


@dataclass(frozen=True, slots=True)
class HiresFix:
    """The pictures drawn so far, enlarged, are drawn over at half strength, under a cache run of its own.

    enlarge: a network, whose pictures are resampled to the size that is drawn; None: Lanczos alone. until: the share of
    the schedule that is over then.
    """

    enlarge: Enlarger | None = None
    until: float = 1.0

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        first, full = sizes(model, params)
        if first == full:
            return 0
        limits.need_two(params, "hires_fix")
        return model.steps_before(params, STRENGTH, self.until)

    def run(self, drawing: Drawing) -> None:
        first, full = sizes(drawing.model, drawing.params)
        if first == full:
            drawing.warnings.append(
                f"hires_fix had no effect: {drawing.model.spec.name} was trained at {drawing.model.native_pixels} "
                f"pixels and draws {full[0]}×{full[1]} at once. Ask for a larger picture."
            )
            return
        with drawing.clock("decode"):
            pictures = drawing.decode()
            if self.enlarge is not None:
                pictures = [self.enlarge(image, drawing.model.device) for image in pictures]
            pictures = [image.resize(full, Image.Resampling.LANCZOS) for image in pictures]
        drawing.size = full
        drawing.latents = drawing.from_pictures("hires_fix", pictures, STRENGTH, until=self.until, mask=drawing.mask)


def sizes(model: Sizes, params: GenerationParams) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height), pixels, of the first run and of the second.

    The second is the request's. The first is half of it, but has at least the pixels that the model was trained on,
    below which it draws badly; equal sizes say that there is nothing to enlarge. A model that draws at fixed sizes
    takes one of them first and its double then.
    """
    width, height = limits.render_size(model.spec, params.width, params.height)
    if model.spec.render_sizes:
        return (width, height), (SCALE * width, SCALE * height)
    scale = max(1 / SCALE, math.sqrt(model.native_pixels / (width * height)))
    if scale >= 1:
        return (width, height), (width, height)
    first = [max(1, round(scale * side / model.size_multiple)) * model.size_multiple for side in (width, height)]
    return (first[0], first[1]), (width, height)
