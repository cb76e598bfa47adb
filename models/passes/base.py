"""From noise to latents: the pipeline's own run, which every request without an upload begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.base import GenerationParams

    from .drawing import Drawing


@dataclass(frozen=True, slots=True)
class Base:
    """All steps of the noise schedule, at the drawing's size."""

    def steps(self, params: GenerationParams) -> int:
        return params.steps

    def run(self, drawing: Drawing) -> None:
        drawing.latents = drawing.denoise(
            "base", drawing.model.pipeline, steps=drawing.params.steps, width=drawing.width, height=drawing.height
        )
