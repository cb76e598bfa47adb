"""AUTOMATIC1111's sampler and scheduler names, and what they are here.

Names, aliases and what `Automatic` stands for: modules/sd_samplers_kdiffusion.py, sd_samplers_timesteps.py and
sd_schedulers.py of its version 1.10.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from app.errors import Invalid
from app.http.schemas import shown


@dataclass(frozen=True, slots=True)
class Sampler:
    """`ours`: its name here. `automatic`: the scheduler, by our name, that it has unless one is named.

    `eta`: its share of fresh noise a step, and whether another one would change anything.
    """

    name: str
    ours: str
    aliases: tuple[str, ...]
    automatic: str | None = None
    eta: float | None = None


@dataclass(frozen=True, slots=True)
class Scheduler:
    name: str
    label: str
    ours: str | None


SAMPLERS = (
    Sampler("DPM++ 2M", "dpmpp_2m", ("k_dpmpp_2m",), "karras"),
    Sampler("DPM++ SDE", "dpmpp_sde", ("k_dpmpp_sde",), "karras", eta=1.0),
    Sampler("DPM++ 2M SDE", "dpmpp_2m_sde", ("k_dpmpp_2m_sde",), "exponential", eta=1.0),
    Sampler("DPM++ 3M SDE", "dpmpp_3m_sde", ("k_dpmpp_3m_sde",), "exponential", eta=1.0),
    Sampler("Euler a", "euler_ancestral", ("k_euler_a", "k_euler_ancestral"), eta=1.0),
    Sampler("Euler", "euler", ("k_euler",)),
    Sampler("LMS", "lms", ("k_lms",)),
    Sampler("Heun", "heun", ("k_heun",)),
    Sampler("DPM2", "dpm2", ("k_dpm_2",), "karras"),
    Sampler("DPM2 a", "dpm2_ancestral", ("k_dpm_2_a",), "karras", eta=1.0),
    Sampler("LCM", "lcm", ("k_lcm",)),
    Sampler("DDIM", "ddim", ("ddim",), eta=0.0),
    Sampler("PLMS", "pndm", ("plms",)),
    Sampler("UniPC", "unipc", ("unipc",)),
    Sampler("DEIS", "deis", ()),
)
AUTOMATIC = Scheduler("automatic", "Automatic", None)
SCHEDULERS = (
    AUTOMATIC,
    Scheduler("uniform", "Uniform", "normal"),
    Scheduler("normal", "Normal", "normal"),
    Scheduler("karras", "Karras", "karras"),
    Scheduler("exponential", "Exponential", "exponential"),
    Scheduler("sgm_uniform", "SGM Uniform", "sgm_uniform"),
    Scheduler("align_your_steps", "Align Your Steps", "ays"),
    Scheduler("beta", "Beta", "beta"),
)
_SAMPLERS = {word.lower(): sampler for sampler in SAMPLERS for word in (sampler.name, sampler.ours, *sampler.aliases)}
_SCHEDULERS = {
    word.lower(): scheduler
    for scheduler in SCHEDULERS
    for word in (scheduler.name, scheduler.label, scheduler.ours or scheduler.name)
}


def pair(sampler: str, scheduler: str | None, *, field: str = "sampler_name") -> tuple[Sampler, str | None]:
    """The sampler, and the scheduler by our name, None for the model's own.

    `sampler` may end in a scheduler's label ("DPM++ 2M Karras"), as the names of older versions do. Raises Invalid.
    """
    named = _scheduler(scheduler)
    base, suffix = sampler, None
    for one in SCHEDULERS[1:]:
        for word in (one.label, one.name):
            if sampler.lower().endswith(f" {word.lower()}"):
                base, suffix = sampler[: -len(word) - 1], one
    found = _SAMPLERS.get(base.lower())
    if found is None:
        raise Invalid(
            f"There is no sampler {shown(sampler)!r} here. There is: {', '.join(one.name for one in SAMPLERS)}.",
            field=field,
        )
    if suffix is not None and named is not AUTOMATIC and named != suffix:
        raise Invalid(
            f"{sampler} names the scheduler {suffix.label} already, and scheduler {named.label}; give one of them.",
            field="scheduler",
        )
    chosen = suffix or named
    return found, found.automatic if chosen is AUTOMATIC else chosen.ours


def scheduler_alone(scheduler: str | None) -> str | None:
    """Our name of a scheduler that comes without a sampler. Raises Invalid."""
    return _scheduler(scheduler).ours


def label_of(ours: str | None) -> str:
    """What AUTOMATIC1111 calls a sampler of ours."""
    return next((sampler.name for sampler in SAMPLERS if sampler.ours == ours), ours or "default")


def known(ours: Collection[str]) -> list[Sampler]:
    """Those of them that are among our names `ours`."""
    return [sampler for sampler in SAMPLERS if sampler.ours in ours]


def _scheduler(name: str | None) -> Scheduler:
    found = _SCHEDULERS.get((name or AUTOMATIC.name).lower())
    if found is None:
        labels = ", ".join(one.label for one in SCHEDULERS)
        raise Invalid(f"There is no scheduler {shown(name or '')!r} here. There is: {labels}.", field="scheduler")
    return found
