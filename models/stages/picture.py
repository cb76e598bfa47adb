"""From a client's picture to latents, in noise's place (Meng et al. 2022, "SDEdit")."""

from __future__ import annotations

from dataclasses import dataclass

from models import limits
from models.base import GenerationParams, Img2Img, TooFewSteps

from .drawing import Drawing
from .model import Sizes


@dataclass(frozen=True, slots=True)
class FromPicture:
    """The picture, cut to the drawing's aspect, noised and drawn over: diffusers' own img2img pipeline."""

    settings: Img2Img

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        steps = model.partial_steps(params.steps, self.settings.denoise)
        if steps < 1:
            raise TooFewSteps(
                f"A denoise of {self.settings.denoise:g} leaves no step of {params.steps} to run: raise one of them."
            )
        return steps

    def run(self, drawing: Drawing) -> None:
        picture = limits.fit(self.settings.picture, *drawing.size)
        drawing.latents = drawing.from_pictures("img2img", [picture] * len(drawing.seeds), self.settings.denoise)
