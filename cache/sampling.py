"""What a diffusers scheduler tells of the run that it is about to step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

SMALL = 1e-3  # a prediction that no scheduler clips


def calls_of(scheduler: Any, timestep: float) -> int | None:
    """How often a diffusers pipeline calls its denoiser in a run that begins at `timestep`.

    None if that is not where the scheduler's timesteps begin: img2img runs a part of them.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    return None if timesteps is None or float(timesteps[0]) != timestep else len(timesteps)


def responses(scheduler: Any) -> tuple[float, ...] | None:
    """By how much each remaining call's prediction moves the final latent, all others left as they are.

    scheduler: a diffusers scheduler whose timesteps are set, before its next step. None where that is not known
    beforehand, because it draws noise or does not step what is no picture, and where two calls share a timestep: a
    prediction is no function of the call's number then.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps):
        return None
    remaining = timesteps[begun(scheduler) :].cpu()
    calls = len(remaining)
    if calls > len(set(remaining.tolist())):
        return None

    def final(predictions: Tensor) -> Tensor:
        stepper = copy.deepcopy(scheduler)
        vars(stepper).pop("step", None)  # of whoever watches the steps; it would move the scheduler itself
        for name, value in vars(stepper).items():  # wherever its tables lie, σ above all: the predictions are here
            if isinstance(value, Tensor):
                setattr(stepper, name, value.cpu())
        sample = torch.zeros_like(predictions[:1])
        for timestep, prediction in zip(remaining, predictions, strict=False):
            if hasattr(stepper, "scale_model_input"):
                stepper.scale_model_input(sample, timestep)
            sample = stepper.step(prediction[None], timestep, sample, return_dict=False)[0]
        return sample.flatten()

    units = SMALL * torch.eye(calls, dtype=torch.float64).view(calls, calls, 1, 1)
    try:
        if final(0 * units[:1]).any():
            return None
        found = final(units) / SMALL
    except Exception:  # noqa: BLE001  # somebody's own scheduler may refuse in any way what is no picture
        return None
    return tuple(found.tolist()) if found.isfinite().all() else None


def begun(scheduler: Any) -> int:
    """The first timestep of the run: img2img begins midway."""
    return getattr(scheduler, "step_index", None) or getattr(scheduler, "begin_index", None) or 0
