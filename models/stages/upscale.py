"""Enlarge finished pictures by a network."""

from __future__ import annotations

from dataclasses import dataclass

from models.base import GenerationParams
from models.errors import UpscalerFailed
from models.upscaling import MOST_PIXELS, Enlarger

from .drawing import Drawing
from .model import Sizes


@dataclass(frozen=True, slots=True)
class Upscale:
    """The last stage: pictures of `enlarge.scale` times the request's size."""

    enlarge: Enlarger

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        scale = self.enlarge.scale
        if params.width * params.height * scale**2 > MOST_PIXELS:
            raise UpscalerFailed(
                f"{self.enlarge.name} would enlarge {params.width}×{params.height} to {scale * params.width}×"
                f"{scale * params.height} pixels, more than {MOST_PIXELS} in all. Ask for a smaller picture."
            )
        return 0

    def run(self, drawing: Drawing) -> None:
        with drawing.clock("decode"):
            drawing.images = [self.enlarge(image, drawing.model.device) for image in drawing.images]
