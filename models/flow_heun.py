"""Heun's method on a flow-matching model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class FlowMatchHeunScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Second order: each step but the last evaluates the velocity at both ends and goes along their mean.

    diffusers' own FlowMatchHeunDiscreteScheduler takes neither the pipeline's sigmas nor its resolution-dependent
    shift, so Flux cannot use it. This one takes its schedule from the Euler scheduler, N sigmas and a closing zero,
    and reports 2N - 1 timesteps: t₀, then every later one twice. `model_output` is the velocity dx/dσ.
    (Karras et al. 2022, "Elucidating the Design Space", algorithm 1 with γ = 0, on the ODE of Lipman et al. 2023.)
    """

    order = 2

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])  # (2N - 1,)
        self._begun: tuple[torch.Tensor, torch.Tensor] | None = None  # sample and velocity at the step's first end

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        *,
        return_dict: bool = True,
        **_: Any,
    ) -> tuple[torch.Tensor] | Any:
        """One evaluation: from the first end to a trial point at the second, or from there to the step's result."""
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        velocity = model_output.float()
        if self._begun is None:
            start = sample.float()
            self._begun = (start, velocity)
            ended = bool(sigma_next == 0)  # the velocity at σ = 0 is not defined: the last step is Euler's
        else:
            start, first = self._begun
            velocity = (first + velocity) / 2
            ended = True
        result = (start + (sigma_next - sigma) * velocity).to(model_output.dtype)
        if ended:
            self._begun = None
            self._step_index += 1
        if not return_dict:
            return (result,)
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result)
