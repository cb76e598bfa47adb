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


def orthogonalised(matrices: Tensor, precision: torch.dtype, iterations: int = 5) -> Tensor:
    """Nearly U Vᵀ of each matrix = U S Vᵀ, by the quintic Newton-Schulz iteration, for which bfloat16 is enough.

    Shape (count, rows, columns): matrices of one shape go together, most of the time would be calls otherwise.
    """
    x = matrices.to(precision)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """For parameters of two and more dimensions; `lr` and `weight_decay` as one would give AdamW.

    precision: what updates are orthogonalised in.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        precision: torch.dtype,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for shape, parameters in alike.items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                mixed = torch._foreach_lerp(gradients, buffers, group["momentum"])
                made = orthogonalised(torch.stack([update.reshape(shape) for update in mixed]), self.precision)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                updates = [one.view(p.shape) for one, p in zip(made, parameters, strict=True)]
                torch._foreach_add_(parameters, updates, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
