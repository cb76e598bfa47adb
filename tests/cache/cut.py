"""A UNet's view that is cut where the test says."""

from __future__ import annotations

from torch import nn

from cache import UNetDenoiser


class Cut(UNetDenoiser):
    """Its costs let depth 0 choose `branch`; None: no branch is cheap enough."""

    def __init__(self, root: nn.Module, branch: int | None = 0) -> None:
        super().__init__(root)
        self.branch = branch

    @property
    def branch_costs(self) -> tuple[float, ...]:
        deepest = -1 if self.branch is None else self.branch
        return tuple(0.4 if branch <= deepest else 0.9 for branch in range(self.branches))
