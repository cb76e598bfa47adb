"""What diffusers' schedulers lack or get wrong: three classes of our own, and steps for which no host waits."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_dpmsolver_sde
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cache.transfer import upload


@functools.cache
def on_host(scheduler_class: Any) -> Any:
    """`scheduler_class` with its schedule in main memory, wherever the latents lie.

    diffusers puts the timesteps on the device and looks them up in tables on the CPU: each look waits until the device
    has done all that is queued, up to seven times a step. Here they stay on the CPU, a denoiser's too, and what `step`
    sends to the device goes there without waiting. The arithmetic is the class's own, bit for bit.

    A run begins at the schedule's first step unless a pipeline says otherwise. diffusers would look for its first
    timestep, takes the second place where it stands twice, and then runs over the end (`beta`, many steps).

    Some constructors set a thousand timesteps, which a run sets anew: dpm2's took a fifth of a second. Here they set
    two.
    """
    own = inspect.signature(scheduler_class.set_timesteps)

    @functools.wraps(scheduler_class.__init__)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        self._constructing = True
        scheduler_class.__init__(self, *args, **kwargs)
        del self._constructing

    @functools.wraps(scheduler_class.set_timesteps)  # pipelines read the signature
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = own.bind(self, *args, **kwargs)
        bound.arguments["device"] = "cpu"
        if hasattr(self, "_constructing"):
            bound.arguments["num_inference_steps"] = 2
        scheduler_class.set_timesteps(*bound.args, **bound.kwargs)
        if hasattr(self, "set_begin_index"):
            self.set_begin_index(0)

    @functools.wraps(scheduler_class.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _WithoutWaiting():
            return scheduler_class.step(self, *args, **kwargs)

    members = {"__init__": construct, "set_timesteps": set_timesteps, "step": step}
    return type(scheduler_class.__name__, (scheduler_class,), {**members, "__module__": scheduler_class.__module__})


class _WithoutWaiting(TorchFunctionMode):
    """Copies to a device go through pinned memory, and a system of equations (UniPC's) is not read to be checked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **kwargs)[0]
        if func is Tensor.to and args[0].device.type == "cpu":
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type != "cpu" and memory_format is None:
                return upload(args[0] if dtype is None else args[0].to(dtype), device)
        return func(*args, **kwargs)


class DPMSolverSDEScheduler(scheduling_dpmsolver_sde.DPMSolverSDEScheduler):
    """DPM-Solver++(SDE) with its Brownian motion on the CPU, where every other sampler's noise is drawn.

    diffusers' own, which this one takes the place of, grows it on the latents' device, whose generator draws other
    numbers for the same seed: a picture would depend on the device.
    """

    noise_sampler: Any

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.noise_sampler is None:
            lowest, highest = self.sigmas[self.sigmas > 0].min().item(), self.sigmas.max().item()
            like, device = torch.empty(sample.shape, dtype=sample.dtype), sample.device
            tree = scheduling_dpmsolver_sde.BrownianTreeNoiseSampler(like, lowest, highest, self.noise_sampler_seed)
            self.noise_sampler = lambda sigma, target: tree(sigma, target).to(device)
        return super().step(model_output, timestep, sample, *args, **kwargs)


class FlowMatchHeunScheduler(FlowMatchEulerDiscreteScheduler):
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
        once: torch.Tensor = self.timesteps  # (N,)
        self.timesteps: torch.Tensor = torch.cat([once[:1], once[1:].repeat_interleave(2)])  # (2N - 1,)
        self._begun: tuple[torch.Tensor, torch.Tensor] | None = None  # sample and velocity at the step's first end

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Of `timesteps`, where a run that begins from a picture starts; the sigmas have each step once."""
        super().set_begin_index(begin_index // self.order)

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
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result)


class ThirdOrderSDEScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++(3M) SDE with the sign of its last term put right.

    diffusers 0.42.1 weights the second difference D₂ with (1 - e^(-2h) - 2h) / (2h)² - ½; the expansion (Lu et al.
    2022, "DPM-Solver++", appendix B, with 2h for h as in k-diffusion's sample_dpmpp_3m_sde) says + ½. With the minus
    the term does not vanish with the step: on Gaussian data the samples' spread grows with the number of steps, 17 %
    too wide at 150. What is lacking is α·D₂, added here.
    """

    def multistep_dpm_solver_third_order_update(
        self,
        model_output_list: list[torch.Tensor],
        *args: Any,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        result: torch.Tensor = super().multistep_dpm_solver_third_order_update(
            model_output_list, *args, sample=sample, noise=noise, **kwargs
        )
        if self.config.algorithm_type != "sde-dpmsolver++":
            return result
        at = self.step_index
        alphas, sigmas = zip(
            *(self._sigma_to_alpha_sigma_t(self.sigmas[i]) for i in range(at - 2, at + 2)), strict=True
        )
        two_back, back, now, target = (a.log() - s.log() for a, s in zip(alphas, sigmas, strict=True))  # log-SNR / 2
        r0, r1 = (now - back) / (target - now), (back - two_back) / (target - now)
        m0, m1, m2 = model_output_list[-1], model_output_list[-2], model_output_list[-3]
        second_difference = ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)
        corrected: torch.Tensor = result + alphas[-1] * second_difference
        return corrected
