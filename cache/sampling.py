"""What a diffusers scheduler tells of the run that it is about to step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .prediction import Diffusion, FlowMatching, Level, prediction_of, setting
from .schedule import is_even

# Of clean latents, their standard deviation: σ_data of Karras et al. 2022, "Elucidating the Design Space", section 5.
SPREAD = 0.5
SMALL = 1e-3  # a prediction that no scheduler clips

# Of diffusers' schedulers those that step by the predictions alone, as far as their settings draw no noise either. LMS
# does too, but weighs four predictions with alternating signs, and gained nothing: docs/decisions/responses.md.
FOLLOWING = {
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "UniPCMultistepScheduler",
}


def timesteps_of(scheduler: Any, first: float) -> list[float] | None:
    """Those at which a diffusers pipeline calls its denoiser in a run that begins at `first`.

    None if that is not where the scheduler's timesteps begin: img2img runs a part of them.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    return None if timesteps is None or float(timesteps[0]) != first else timesteps.tolist()


def follows(scheduler: Any) -> bool:
    """Whether the scheduler's type and settings say that its steps follow from the predictions alone.

    What has a `step` of its own, as somebody's subclass may, is not known.
    """
    owner = next((kind for kind in type(scheduler).__mro__ if "step" in vars(kind)), object)
    if owner.__name__ not in FOLLOWING or not owner.__module__.startswith("diffusers."):
        return False
    noisy = "sde" in str(setting(scheduler, "algorithm_type")) or setting(scheduler, "stochastic_sampling")
    return not noisy and not setting(scheduler, "thresholding")  # which looks at all of a picture


def responses(scheduler: Any) -> tuple[float, ...] | None:
    """By how much a change of each remaining call's prediction moves the final latent.

    What the later calls make of it counts: a network takes a part of the change for noise and removes it. How much is
    here what the best network for Gaussian pictures of spread SPREAD does. In noise σ ≫ SPREAD a change shrinks as the
    noise does (the estimate of the clean latents stays), below it stays.

    scheduler: a diffusers scheduler whose timesteps are set, before its next step. None where that is not known
    beforehand (`follows`); where two calls share a timestep, as a prediction is no function of the call's number then;
    and where a diffusion's timesteps are not even, as to repay lost there about as often as it won
    (docs/decisions/responses.md).
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps) or not follows(scheduler):
        return None
    remaining = timesteps[begun(scheduler) :].cpu()
    calls = len(remaining)
    if calls > len(set(remaining.tolist())):
        return None
    prediction = prediction_of(scheduler)
    if isinstance(prediction, Diffusion) and not is_even(remaining.tolist()):
        return None
    unit = scheduler.config.num_train_timesteps if isinstance(prediction, FlowMatching) else 1
    stepper = stepping_copy(scheduler)
    sample = torch.zeros(1, calls, 1, 1, dtype=torch.float64)  # in channel k, call k has another prediction
    for call, timestep in enumerate(remaining):
        x = stepper.scale_model_input(sample, timestep) if hasattr(stepper, "scale_model_input") else sample
        level = prediction.at(float(timestep) / unit)
        output = prediction.output(x, _likely(level) * x, level)
        output[:, call] += SMALL
        sample = stepper.step(output, timestep, sample, return_dict=False)[0]
    found = sample.flatten() / SMALL
    return tuple(found.tolist()) if found.isfinite().all() else None


def _likely(level: Level) -> float:
    """The share of a latent that is the estimate of the clean one, for clean latents of standard deviation SPREAD."""
    return level.alpha * SPREAD**2 / ((level.alpha * SPREAD) ** 2 + level.sigma**2)


def stepping_copy(scheduler: object) -> Any:
    """The scheduler as it is now, on the CPU, to be stepped apart: what shadows its methods (previews) stays behind."""
    kind = type(scheduler)
    other = object.__new__(kind)
    for name, value in vars(scheduler).items():
        if not callable(getattr(kind, name, None)):
            vars(other)[name] = value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
    return other


def begun(scheduler: Any) -> int:
    """The first timestep of the run: img2img begins midway."""
    return getattr(scheduler, "step_index", None) or getattr(scheduler, "begin_index", None) or 0
