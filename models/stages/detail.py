"""Find faces and draw each anew at the model's own size: a small face has too few latents to be drawn well.

The order of the extension of that name: detect, enlarge a crop around the face, draw over it at a low strength, put the
face back under a mask with soft edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFilter

from models import faces, limits
from models.base import GenerationParams

from .drawing import Drawing
from .model import Sizes
from .region import Frame, Region, framed

STRENGTH = 0.4
CONTEXT = 2.0  # side of the crop by the face's longer side
MASK = 1.1  # of the mask's box by the face's, before its edges are softened
FEATHER = 0.1  # radius of the softening by the face's longer side
MOST_FACES = 8  # of a picture, the largest; each is a run of the denoiser


@dataclass(frozen=True, slots=True)
class ADetailer:
    """Works on finished pictures of the request's size; each face is drawn under a cache run of its own."""

    find: Callable[[Image.Image], list[faces.Box]] = faces.find

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        limits.need_two(params, "adetailer")
        return 0  # nobody knows before the picture is there

    def run(self, drawing: Drawing) -> None:
        model, params = drawing.model, drawing.params
        with drawing.clock("decode"):
            found = [self._faces(drawing, image)[:MOST_FACES] for image in drawing.images]
        steps = model.partial_steps(params.steps, strength(params))
        drawing.progress.total += steps * sum(map(len, found))
        part = "the picture" if drawing.region is None else "what was drawn of the picture"
        for index, boxes in enumerate(found):
            if not boxes:
                drawing.warnings.append(
                    f"ADetailer found no face in {part} of seed {drawing.seeds[index]}; it is as it was drawn."
                )
            for box in boxes:
                drawing.images[index] = self._redrawn(drawing, index, box)

    def _faces(self, drawing: Drawing, image: Image.Image) -> list[faces.Box]:
        """Those of which something will show."""
        found = self.find(image)
        if drawing.region is None:
            return found
        shown = drawing.region.weights.resize(image.size)
        return [box for box in found if shown.crop(corners(box)).getbbox()]

    def _redrawn(self, drawing: Drawing, index: int, box: faces.Box) -> Image.Image:
        image = drawing.images[index]
        frame = around(box, image.size)
        region = Region(frame, feathered(box, frame))
        size = drawing_size(drawing.model, region.size)
        enlarged = region.cut(image, size)
        latents = drawing.from_pictures("adetailer", [enlarged], strength(drawing.params), only=index, part=region)
        with drawing.clock("decode"):
            (drawn,) = drawing.model.decode(latents, *size)
            return region.put_back(image, drawn)


def strength(params: GenerationParams) -> float:
    """One step at least."""
    return max(STRENGTH, 1 / params.steps)


def corners(box: faces.Box) -> Frame:
    return box.left, box.top, box.left + box.width, box.top + box.height


def around(box: faces.Box, size: tuple[int, int]) -> Frame:
    """A square around the face, moved and cut to lie within a picture of `size`."""
    side = round(CONTEXT * max(box.width, box.height))
    return framed(corners(box), (side, side), size)


def drawing_size(model: Sizes, crop: tuple[int, int]) -> tuple[int, int]:
    """(width, height), pixels, to draw a crop at: of its aspect, with the pixels that the model was trained on.

    A crop that has more of them keeps its size.
    """
    if model.spec.render_sizes:
        return limits.render_size(model.spec, *crop)
    scale = max(1.0, math.sqrt(model.native_pixels / (crop[0] * crop[1])))
    width, height = (max(1, round(scale * side / model.size_multiple)) * model.size_multiple for side in crop)
    return width, height


def feathered(box: faces.Box, frame: Frame) -> Image.Image:
    """How much of the new crop shows, 0 … 255: all of it on the face, nothing at the crop's edge."""
    width, height = frame[2] - frame[0], frame[3] - frame[1]
    radius = FEATHER * max(box.width, box.height)
    middle = (box.left - frame[0] + box.width / 2, box.top - frame[1] + box.height / 2)
    half = (MASK * box.width / 2, MASK * box.height / 2)
    mask = Image.new("L", (width, height))
    box_of_mask = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
    ImageDraw.Draw(mask).rounded_rectangle(box_of_mask, radius=2 * radius, fill=255)
    return mask.filter(ImageFilter.GaussianBlur(radius))
