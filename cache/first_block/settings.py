"""What the first-block cache is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Settings:
    """Run the first block; skip the others while its residual differs by less than `threshold` from the kept one.

    threshold: relative mean absolute difference, 0 to 1; 0 never reuses, published settings lie between .03 and .15.
    max_consecutive: the most calls in a row that may reuse; None for no cap.
    forecast: whether the remaining blocks' residuals are taken along a line as far as the first block's has moved along
        its own (`cache/forecast.py`), the threshold bounding the sum of what that one leaves unexplained, and a
        computed call repays what the reused ones before it got wrong, for a sampler that the view knows
        (`cache/solver.py`). Without, it is the published cache.
    The decision is the host's: a call waits for a GPU once.
    """

    name: ClassVar[str] = "first_block"

    threshold: float = 0.05
    max_consecutive: int | None = None
    forecast: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise ValueError(f"threshold must be a number from 0 to 1, not {self.threshold!r}.")
        if not 0 <= self.threshold <= 1:  # false for NaN as well
            raise ValueError(f"threshold must lie between 0 (never reuse) and 1, not at {self.threshold}.")
        if self.max_consecutive is not None and (type(self.max_consecutive) is not int or self.max_consecutive < 1):
            raise ValueError(f"max_consecutive must be 1 or more, or None for no cap, not {self.max_consecutive!r}.")
        if type(self.forecast) is not bool:
            raise ValueError(f"forecast must be True or False, the published cache, not {self.forecast!r}.")
