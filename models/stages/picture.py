"""From a client's picture to latents, in noise's place (Meng et al. 2022, "SDEdit")."""

from __future__ import annotations

from dataclasses import dataclass

from models import limits
from models.base import GenerationParams, Img2Img
from models.errors import TooFewSteps

from .drawing import Drawing
from .model import Sizes


@dataclass(frozen=True, slots=True)
class FromPicture:
    """The picture, cut to the drawing's aspect, noised and drawn over: diffusers' own img2img pipeline.

    until: the share of the schedule that is over then.
    """

    settings: Img2Img
    until: float = 1.0

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        if model.partial_steps(params.steps, self.settings.denoise) < 1:
            raise TooFewSteps(
                f"A denoise of {self.settings.denoise:g} leaves no step of {params.steps} to run: raise one of them."
            )
        return model.steps_before(params, self.settings.denoise, self.until)

    def run(self, drawing: Drawing) -> None:
        picture = limits.fit(self.settings.picture, *drawing.size)
        pictures = [picture] * len(drawing.seeds)
        drawing.latents = drawing.from_pictures("img2img", pictures, self.settings.denoise, until=self.until)
