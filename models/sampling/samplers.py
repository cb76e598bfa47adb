"""Samplers and schedulers by their common names, and the diffusers scheduler that each pair stands for.

The table is data: it is read without torch or diffusers, so that a bad pair is refused before a model is asked. Which
class takes which flag is checked against diffusers' own signatures by tests/models/sampling/test_samplers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.base import GenerationParams
from models.errors import UnsupportedSampler

# Align Your Steps (Sabour et al. 2024): the published ten timesteps for Stable Diffusion 1.5 and XL. diffusers has them
# as AysSchedules, whose import would load torch; a test holds them to be equal.
AYS_TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
AYS_TIMESTEPS_XL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)

# Scheduler name → config flags of the diffusers class (its documentation, "Schedulers", table "Noise schedules and
# schedule types"), for each kind of class. "normal" keeps the timestep spacing that the model was saved with.
Schedulers = Mapping[str, Mapping[str, object]]

_PLAIN: Mapping[str, object] = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW: Schedulers = {
    "normal": _PLAIN,
    "karras": {**_PLAIN, "use_karras_sigmas": True},
    "exponential": {**_PLAIN, "use_exponential_sigmas": True},
    "beta": {**_PLAIN, "use_beta_sigmas": True},
}
_SPACED: Schedulers = {"normal": {}, "sgm_uniform": {"timestep_spacing": "trailing"}}
_SIGMAS: Schedulers = {
    "normal": _PLAIN,
    "karras": _FLOW["karras"],
    "exponential": {**_FLOW["exponential"], "timestep_spacing": "linspace"},
    "beta": {**_FLOW["beta"], "timestep_spacing": "linspace"},
    "sgm_uniform": {**_PLAIN, "timestep_spacing": "trailing"},
}
_TIMESTEPS: Schedulers = {**_SIGMAS, "ays": _PLAIN}  # its set_timesteps takes the list of `custom_timesteps`


@dataclass(frozen=True, slots=True)
class Sampler:
    """A scheduler class by name, diffusers' or our own, what makes it this sampler, and the schedulers it can take.

    `noise_seeds`: the setting that takes the images' seeds, for a scheduler that draws its noise from no generator.
    """

    scheduler_class: str
    schedulers: Schedulers
    settings: Mapping[str, object] = field(default_factory=dict)
    noise_seeds: str | None = None


DIFFUSION: Mapping[str, Sampler] = {
    "euler": Sampler("EulerDiscreteScheduler", _TIMESTEPS),
    "euler_ancestral": Sampler("EulerAncestralDiscreteScheduler", _SPACED),
    "heun": Sampler("HeunDiscreteScheduler", _TIMESTEPS),
    "dpm2": Sampler("KDPM2DiscreteScheduler", _SIGMAS),
    "dpm2_ancestral": Sampler("KDPM2AncestralDiscreteScheduler", _SIGMAS),
    "dpmpp_2m": Sampler(
        "DPMSolverMultistepScheduler", _TIMESTEPS, {"algorithm_type": "dpmsolver++", "solver_order": 2}
    ),
    "dpmpp_2m_sde": Sampler(
        "DPMSolverMultistepScheduler", _TIMESTEPS, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    ),
    "dpmpp_sde": Sampler("DPMSolverSDEScheduler", _SIGMAS, noise_seeds="noise_sampler_seed"),
    "dpmpp_3m_sde": Sampler(
        "ThirdOrderSDEScheduler", _TIMESTEPS, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    ),
    # Latents are not confined to [-1, 1]; DDIM's default clips them.
    "ddim": Sampler("DDIMScheduler", _SPACED, {"clip_sample": False}),
    "lms": Sampler("LMSDiscreteScheduler", _SIGMAS),
    "pndm": Sampler("PNDMScheduler", _SPACED, {"skip_prk_steps": True}),
    "unipc": Sampler("UniPCMultistepScheduler", _SIGMAS),
    "deis": Sampler("DEISMultistepScheduler", _SIGMAS),
    "lcm": Sampler("LCMScheduler", _SPACED),
}

FLOW_MATCHING: Mapping[str, Sampler] = {
    "euler": Sampler("FlowMatchEulerDiscreteScheduler", _FLOW),
    "heun": Sampler("FlowMatchHeunScheduler", _FLOW),
}

DEFAULT_SAMPLER = "euler"


def choices(samplers: Mapping[str, Sampler]) -> dict[str, tuple[str, ...]]:
    """Sampler name → the scheduler names that it can be paired with."""
    return {name: tuple(sampler.schedulers) for name, sampler in samplers.items()}


def check(pairs: Mapping[str, tuple[str, ...]], sampler: str | None, scheduler: str | None) -> None:
    """Raise UnsupportedSampler, naming what there is instead, unless `pairs` offers this sampler and scheduler.

    A scheduler without a sampler is paired with `euler`.
    """
    name = sampler or DEFAULT_SAMPLER
    if name not in pairs:
        raise UnsupportedSampler(f"There is no sampler {name!r} for this model. It has: {', '.join(pairs)}.")
    if scheduler is not None and scheduler not in pairs[name]:
        also = [other for other, schedulers in pairs.items() if scheduler in schedulers]
        remedy = f"; {scheduler!r} goes with: {', '.join(also)}" if also else ""
        raise UnsupportedSampler(
            f"The sampler {name!r} cannot be paired with the scheduler {scheduler!r}. "
            f"It takes: {', '.join(pairs[name])}{remedy}."
        )


def build(
    saved: Any,
    samplers: Mapping[str, Sampler],
    sampler: str | None,
    scheduler: str | None,
    *,
    steps: int,
    seeds: Sequence[int],
) -> Any:
    """A scheduler for one run, with the noise schedule and prediction type of the model's `saved` one.

    Its timesteps lie on the CPU (`schedulers.on_host`). Without names it is a fresh instance of the saved one. `seeds`
    has one entry an image of the batch. Raises UnsupportedSampler.
    """
    from . import schedulers

    if sampler is None and scheduler is None:
        own: Any = type(saved)
        return schedulers.on_host(getattr(schedulers, own.__name__, own)).from_config(saved.config)
    check(choices(samplers), sampler, scheduler)
    choice = samplers[sampler or DEFAULT_SAMPLER]
    cls = scheduler_class(choice.scheduler_class)
    settings = {**choice.settings, **(choice.schedulers[scheduler] if scheduler is not None else {})}
    if choice.noise_seeds is not None:
        settings[choice.noise_seeds] = list(seeds)
    if choice.scheduler_class == "LCMScheduler":
        settings["original_inference_steps"] = _lcm_origin(steps, saved.config.num_train_timesteps)
    return schedulers.on_host(cls).from_config(saved.config, **settings)


def names(built: Any, samplers: Mapping[str, Sampler], sampler: str | None, scheduler: str | None) -> tuple[str, str]:
    """The names of the sampler and scheduler that `build` gave a request, which may have left both to the model.

    The model's saved configuration may well say karras. One that no name stands for, such as a spacing of timesteps, is
    `normal`.
    """
    config = built.config

    def differences(name: str) -> int:
        return sum(config.get(setting) != value for setting, value in samplers[name].settings.items())

    if sampler is None and scheduler is None:
        for kind in type(built).__mro__:
            alike = [name for name, choice in samplers.items() if choice.scheduler_class == kind.__name__]
            if alike:
                sampler = min(alike, key=differences)
                break
        else:
            return type(built).__name__, "normal"
    sampler = sampler or DEFAULT_SAMPLER
    if scheduler is None:  # a configuration also holds what another class was saved with, and this one does not take
        takes = samplers[sampler].schedulers
        flagged = (name for name in ("karras", "exponential", "beta") if config.get(f"use_{name}_sigmas"))
        scheduler = next((name for name in flagged if name in takes), "normal")
    return sampler, scheduler


def custom_timesteps(scheduler: str | None, steps: int, published: Sequence[int] = AYS_TIMESTEPS) -> list[int] | None:
    """Training timesteps, falling, for the one scheduler that is given as a list; None for the others.

    Align Your Steps has ten `published` for a model; other counts are read off the straight lines between them.
    """
    if scheduler != "ays":
        return None
    if steps == 1:
        return [published[0]]
    last = len(published) - 1
    timesteps = []
    for step in range(steps):
        place = step * last / (steps - 1)
        left = min(int(place), last - 1)
        timesteps.append(round(published[left] + (place - left) * (published[left + 1] - published[left])))
    return timesteps


def steps_before(
    saved: Any, samplers: Mapping[str, Sampler], params: GenerationParams, published: Sequence[int], share: float
) -> int:
    """How many of a run's steps begin before `share` of the training timesteps is over, as diffusers' denoising_end.

    A step counts whole, be it one call of the denoiser or two.
    """
    steps, timesteps = params.steps, custom_timesteps(params.scheduler, params.steps, published)
    built = build(saved, samplers, params.sampler, params.scheduler, steps=steps, seeds=params.seeds)
    built.set_timesteps(**({"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps}))
    calls, trained = built.timesteps.tolist(), int(built.config.num_train_timesteps)
    extra = max(0, len(calls) - steps * built.order)  # PNDM's first step is two calls
    begins = [*calls[:1], *calls[1 + extra :]][:: built.order]
    return sum(begin >= round(trained - share * trained) for begin in begins)


def scheduler_class(name: str) -> Any:
    """Our own scheduler of that name, or diffusers'."""
    import diffusers

    from . import schedulers

    return getattr(schedulers, name, None) or getattr(diffusers, name)


def _lcm_origin(steps: int, train_timesteps: int) -> int:
    """LCM picks its steps from this many evenly spaced ones; a divisor, so that they begin in pure noise."""
    return next(n for n in range(max(50, steps), train_timesteps + 1) if train_timesteps % n == 0)
