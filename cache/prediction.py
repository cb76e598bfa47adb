"""What a denoiser predicts, and how noisy its input is: from a prediction to the clean latents and back.

    x = α x₀ + σ ε

is what the denoiser is called with. α² + σ² = 1 for diffusion, α + σ = 1 for flow matching; either follows from their
ratio σ / α, and so does the timestep.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

_LEAST = 1e-6  # share of the clean latents in pure noise: by nothing they could not be divided


@dataclass(frozen=True, slots=True)
class Level:
    """Shares of the clean latents (alpha) and of the noise (sigma) in the denoiser's input, and its timestep."""

    alpha: float
    sigma: float
    timestep: float


class Prediction(Protocol):
    """The meaning of a denoiser's inputs and outputs. Timesteps are those that the denoiser is called with."""

    def at(self, timestep: float) -> Level: ...

    def of_ratio(self, ratio: float) -> Level:
        """The level of sigma / alpha = `ratio`, or the nearest one that the schedule has."""
        ...

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """The estimate of x₀."""
        ...

    def output(self, x: Tensor, clean: Tensor, level: Level) -> Tensor:
        """What the denoiser would have answered to `x`, had it estimated `clean`."""
        ...


class FlowMatching:
    """Timesteps from 1, pure noise, to 0; the velocity ε - x₀ is predicted (Lipman et al. 2023)."""

    def at(self, timestep: float) -> Level:
        return Level(max(1 - timestep, _LEAST), timestep, timestep)

    def of_ratio(self, ratio: float) -> Level:
        return self.at(ratio / (1 + ratio))

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        return x - level.sigma * output

    def output(self, x: Tensor, clean: Tensor, level: Level) -> Tensor:
        return (x - clean) / level.sigma


class ReversedFlow(FlowMatching):
    """Timesteps from 0, pure noise, to 1; x₀ - ε is predicted, as Z-Image and Lumina 2 have it."""

    def at(self, timestep: float) -> Level:
        return replace(super().at(1 - timestep), timestep=timestep)

    def of_ratio(self, ratio: float) -> Level:
        return self.at(1 / (1 + ratio))

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        return super().clean(x, -output, level)

    def output(self, x: Tensor, clean: Tensor, level: Level) -> Tensor:
        return -super().output(x, clean, level)


class Diffusion:
    """Training timesteps, fractions of which lie on the line between the logarithms of σ / α, as in Karras et al. 2022.

    alphas_cumprod: α² of each training timestep. kind: epsilon, v_prediction or sample, as in diffusers.
    """

    def __init__(self, alphas_cumprod: Tensor, kind: str) -> None:
        squares = alphas_cumprod.double().cpu().clamp(1e-12, 1 - 1e-12)
        self._logs: list[float] = (((1 - squares) / squares).log() / 2).tolist()  # of σ / α, rising
        self._kind = kind

    def at(self, timestep: float) -> Level:
        index = min(max(int(timestep), 0), len(self._logs) - 2)
        share = min(max(timestep - index, 0.0), 1.0)
        return self._level((1 - share) * self._logs[index] + share * self._logs[index + 1], timestep)

    def of_ratio(self, ratio: float) -> Level:
        log = min(max(math.log(ratio), self._logs[0]), self._logs[-1])
        index = min(next(i for i, later in enumerate(self._logs[1:]) if later >= log), len(self._logs) - 2)
        before, after = self._logs[index], self._logs[index + 1]
        return self._level(log, index + ((log - before) / (after - before) if after > before else 0.0))

    @staticmethod
    def _level(log: float, timestep: float) -> Level:
        ratio = math.exp(log)
        alpha = 1 / math.hypot(1, ratio)
        return Level(alpha, ratio * alpha, timestep)

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        match self._kind:
            case "v_prediction":
                return level.alpha * x - level.sigma * output
            case "epsilon":
                return (x - level.sigma * output) / level.alpha
        return output

    def output(self, x: Tensor, clean: Tensor, level: Level) -> Tensor:
        match self._kind:
            case "v_prediction":  # v = α ε - σ x₀ with ε = (x - α x₀) / σ
                return (level.alpha * x - clean) / level.sigma
            case "epsilon":
                return (x - level.alpha * clean) / level.sigma
        return clean


def setting(scheduler: Any, name: str) -> Any:
    """What a diffusers scheduler was told; None for what its class does not take.

    A configuration that went from class to class holds settings of all of them.
    """
    return scheduler.config.get(name) if name in inspect.signature(type(scheduler).__init__).parameters else None


def prediction_of(scheduler: Any) -> Prediction:
    """Read from a diffusers scheduler."""
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), torch.Tensor) or setting(
        scheduler, "use_flow_sigmas"
    ):
        return FlowMatching()
    return Diffusion(scheduler.alphas_cumprod, scheduler.config.prediction_type)
