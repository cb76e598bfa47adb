"""What DeepCache is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from . import schedule as schedules
from .schedule import WHOLE_SCHEDULE

DEEPEST = 12  # of `depth`

Guidance = Literal["full", "reuse"]
GUIDANCE: tuple[Guidance, ...] = ("full", "reuse")


@dataclass(frozen=True, slots=True)
class Settings:
    """Compute one call in `interval`; run the others outside of a branch that `depth` chooses.

    interval: 1 or more; ⌈calls / interval⌉ calls of a run compute, at 1 all of them.
    depth: 0 to 12, higher is cheaper: a reuse call costs at most 1 / (depth + 2) of a full one, counted at the UNet's
        native size (`flops.deepest_branch`). Where no branch is that cheap, the prediction itself is kept.
    start, end: reuse is allowed at 1000 - timestep within them: 0 is pure noise, 1000 finished. Reading the timestep
        synchronises with a GPU once a call; with 0 and 1000 it is not read.
    forecast: whether a reuse call takes more than the last value of the kept tensor, a damped line through its last
        ones (`cache/forecast.py`), and a computed call repays what the reused ones before it got wrong, for a sampler
        that the view knows (`cache/solver.py`). Without, it is the published cache.
    schedule: where the compute calls lie. `uniform`: every `interval`-th. `auto`: as many, where the denoiser's view
        places them, if it knows the run and no window is set; else uniform. A tuple: those very calls, the first being
        0, whatever the interval.
    guidance: `full` runs both halves of a guided batch in reuse calls. `reuse` runs the half with text alone, at half
        the cost, and takes the other from the guidance difference, which is kept and forecast
        (`deepcache/guidance.py`). It needs a view that knows guided calls; where it cannot act, the report says `full`.
    """

    name: ClassVar[str] = "deepcache"

    interval: int = 3
    depth: int = 2
    start: int = 0
    end: int = WHOLE_SCHEDULE
    forecast: bool = True
    schedule: schedules.Schedule = "auto"
    guidance: Guidance = "full"

    def __post_init__(self) -> None:
        for setting, least, most in (
            ("interval", 1, None),
            ("depth", 0, DEEPEST),
            ("start", 0, WHOLE_SCHEDULE),
            ("end", 0, WHOLE_SCHEDULE),
        ):
            value = getattr(self, setting)
            if type(value) is not int or value < least or (most is not None and value > most):
                bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
                raise ValueError(f"{setting} must be a whole number {bounds}, not {value!r}.")
        if self.start > self.end:
            raise ValueError(f"start ({self.start}) must not lie behind end ({self.end}): exchange them.")
        if type(self.forecast) is not bool:
            raise ValueError(f"forecast must be True or False, the published cache, not {self.forecast!r}.")
        schedules.check(self.schedule)
        if self.guidance not in GUIDANCE:
            raise ValueError(f"guidance must be one of {', '.join(GUIDANCE)}, not {self.guidance!r}.")
