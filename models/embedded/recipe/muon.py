"""Muon: momentum whose update is orthogonalised, for the matrices and convolutions of a network.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the update is scaled to AdamW's usual
size as in Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2, so that one learning rate serves both.
`torch.optim.Muon` takes matrices only; most of what is trained here are convolutions, read as (out, in × kernel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Nearly U Vᵀ of `matrix` = U S Vᵀ, by the quintic Newton-Schulz iteration in bfloat16. Shape (rows, columns)."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """For parameters of two and more dimensions; `lr` and `weight_decay` as one would give AdamW."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"]).reshape(len(parameter), -1)
                size = 0.2 * max(update.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalised(update).view(parameter.shape), alpha=-group["lr"] * size)
