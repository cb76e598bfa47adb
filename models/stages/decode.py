"""From latents to pictures of the size that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from models import limits
from models.base import GenerationParams

from .drawing import Drawing
from .model import Sizes


@dataclass(frozen=True, slots=True)
class Decode:
    """The autoencoder's decoder, then a resampling where the model does not draw at the request's size."""

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        return 0

    def run(self, drawing: Drawing) -> None:
        params = drawing.params
        with drawing.clock("decode"):
            drawn = drawing.decode()
            drawing.images = [limits.fit(image, params.width, params.height) for image in drawn]
        drawing.latents = None
