"""A profile is made, for one sampler, noise schedule and number of steps: placements, then the front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.base import GenerationParams
from models.families.sd import StableDiffusionModel
from models.sampling.samplers import names

from . import calibration, forecasts, halving, profile
from .front import Front, Point
from .unfinished import Unfinished

if TYPE_CHECKING:
    from models.generation import LoadedModel


@dataclass(frozen=True, slots=True)
class Measuring:
    """What is measured of `model` for pictures like `params`, whose seeds are those of a round of each of `prompts`.

    device: its name, for the seconds. kept: what was measured before. tick: told of each drawing; ends the work by
    raising OutOfTime.
    """

    model: LoadedModel
    params: GenerationParams
    prompts: Sequence[str]
    device: str
    kept: Unfinished
    tick: Callable[[str], None]

    @property
    def own(self) -> tuple[str, str]:
        """Sampler and scheduler that the model was saved with."""
        return names(self.model.pipeline.scheduler, self.model.model.choices, None, None)

    @property
    def sampling(self) -> tuple[str, str]:
        """Those that draw here."""
        saved, choices = self.model.pipeline.scheduler, self.model.model.choices
        return names(saved, choices, self.params.sampler, self.params.scheduler)

    def placements(self, intervals: Sequence[int], depth: int) -> None:
        """Found, written, and what the model's runs compute by from now on; of UNets alone. Raises LoadFailed."""
        model = self.model.model
        if not isinstance(model, StableDiffusionModel):
            return
        found = calibration.calibrate(
            calibration.generated(self.model, self.params, self.prompts),
            model.denoiser,
            self.model.pipeline.scheduler,
            sampler=self.sampling,
            steps=self.params.steps,
            intervals=intervals,
            depth=depth,
            progress=self.tick,
            known=self.kept.known,
        )
        profile.write(self.model.spec, self.own, placements=found)
        model.placements = profile.read(self.model.spec).placements

    def front(self) -> None:
        """Found and written. Where time runs out, what was found by then, if nothing was known. Raises LoadFailed."""
        found: Front | None = None
        pictures = self._pictures
        try:
            for points, drawn in halving.fronts(pictures, self._candidates):
                found = self._front(points, drawn)
            portable = () if found is None else found.points
            for points, drawn in halving.fronts(pictures, forecasts.forecasts(pictures), forecasts.RUNGS):
                found = self._front([*portable, *points], drawn)
        except halving.OutOfTime:
            known = {one.key for one in profile.read(self.model.spec).fronts}
            if found is not None and found.key not in known:
                self._write(found)
            raise
        if found is not None:
            self._write(found)

    def most(self, intervals: Sequence[int]) -> int:
        """Drawings that `placements` and `front` may take, about."""
        placing = calibration.rounds(intervals) if isinstance(self.model.model, StableDiffusionModel) else 0
        fitted = forecasts.most(self.params.steps)
        drawn = halving.drawings(len(self._candidates)) + halving.drawings(fitted, forecasts.RUNGS)
        return placing + drawn + forecasts.drawings(self.params.steps)

    @property
    def _candidates(self) -> list[halving.Candidate]:
        guided = self.model.model.runs_twice(self.params)
        return halving.candidates(self.model.denoiser, self.params.steps, guided=guided)

    @property
    def _pictures(self) -> halving.Pictures:
        return halving.Pictures(self.model, self.params, self.prompts, self.kept, self.tick)

    def _front(self, points: Sequence[Point], pictures: int) -> Front:
        sampler, scheduler = self.sampling
        params = self.params
        return Front(
            sampler=sampler,
            scheduler=scheduler,
            steps=params.steps,
            guidance_scale=params.guidance_scale,
            width=params.width,
            height=params.height,
            pictures=pictures,
            device=self.device,
            points=tuple(sorted(points, key=lambda point: point.operations)),
        )

    def _write(self, front: Front) -> None:
        profile.write(self.model.spec, self.own, fronts=[front])
