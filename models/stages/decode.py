"""From latents to pictures of the size that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from models import fine, limits
from models.base import GenerationParams

from .drawing import Drawing
from .model import Sizes


@dataclass(frozen=True, slots=True)
class Decode:
    """The autoencoder's decoder, or the fine one for more pixels than were drawn, then a resampling if need be."""

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        return 0

    def run(self, drawing: Drawing) -> None:
        params, model = drawing.params, drawing.model
        folder = limits.fine_decoder(model.spec, drawing.size, params.width, params.height)
        with drawing.clock("decode"), fine.decoding(model.pipeline.vae, folder, model.device):
            drawn = drawing.decode()
            drawing.images = [limits.fit(image, params.width, params.height) for image in drawn]
        drawing.latents = None
