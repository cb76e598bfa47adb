"""From noise to latents: what every request without an upload begins with."""

from __future__ import annotations

from dataclasses import dataclass

from models.base import GenerationParams

from .drawing import Drawing
from .model import Sizes


@dataclass(frozen=True, slots=True)
class FromNoise:
    """All steps of the noise schedule, at the drawing's size."""

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        return params.steps

    def run(self, drawing: Drawing) -> None:
        drawing.latents = drawing.from_noise("base")
