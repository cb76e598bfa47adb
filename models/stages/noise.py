"""From noise to latents: what every request without an upload begins with."""

from __future__ import annotations

from dataclasses import dataclass

from models.base import GenerationParams

from .drawing import Drawing
from .model import Sizes


@dataclass(frozen=True, slots=True)
class FromNoise:
    """The steps of the noise schedule `until` that share of it is over, at the drawing's size."""

    until: float = 1.0

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        return model.steps_before(params, 1.0, self.until)

    def run(self, drawing: Drawing) -> None:
        drawing.latents = drawing.from_noise("base", until=self.until)
