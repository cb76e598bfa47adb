"""A second model goes on with the latents that the first has begun (Podell et al. 2023, section 2.5).

Each is best at its part of the noise schedule: "ensemble of expert denoisers" (Balaji et al. 2022, "eDiff-I").
"""

from __future__ import annotations

from dataclasses import dataclass

from models import limits
from models.base import GenerationParams
from models.errors import TooFewSteps

from .drawing import Drawing
from .model import Sizes


@dataclass(frozen=True, slots=True)
class Refine:
    """The rest of the schedule from the share `since` on, which the stage before left out; no noise is added.

    strength: the share of the schedule that both parts are the run of.
    """

    since: float
    strength: float = 1.0

    def steps(self, model: Sizes, params: GenerationParams) -> int:
        limits.need_two(params, "refiner_model")
        whole = model.partial_steps(params.steps, self.strength)
        first = model.steps_before(params, self.strength, self.since)
        if not 0 < first < whole:
            idle, move = ("refiner", "a lower one") if first else ("model itself", "a higher one")
            raise TooFewSteps(
                f"refiner_switch {self.since:g} leaves no step of {whole} to the {idle}: give {move}, or more steps."
            )
        return whole - first

    def run(self, drawing: Drawing) -> None:
        drawing.latents = drawing.refined("refiner", self.strength, self.since)
