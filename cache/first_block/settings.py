"""What the first-block cache is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache import forecast as forecasts


@dataclass(frozen=True, slots=True)
class Settings:
    """Run the first block; skip the others while its residual differs by less than `threshold` from the kept one.

    threshold: relative mean absolute difference, 0 to 1; 0 never reuses, published settings lie between .03 and .15.
    max_consecutive: the most calls in a row that may reuse; None for no cap.
    forecast: what a reuse call takes for the remaining blocks' residuals: `none` their last values, `linear` and
        `quadratic` a polynomial through the last two or three, `damped` a cautious line (`cache/forecast.py`); `probe`
        a line as far as the first block's residual has moved along its own, and the threshold bounds the sum of what
        that residual leaves unexplained.
    correction: whether a computed call also repays what the reused ones before it got wrong (`cache/solver.py`),
        for a sampler that the view knows; None: with any forecast but `none`.
    The decision is the host's: a call waits for a GPU once, with `probe` twice.
    """

    name: ClassVar[str] = "first_block"

    threshold: float = 0.05
    max_consecutive: int | None = None
    forecast: forecasts.Forecast = "probe"
    correction: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise ValueError(f"threshold must be a number from 0 to 1, not {self.threshold!r}.")
        if not 0 <= self.threshold <= 1:  # false for NaN as well
            raise ValueError(f"threshold must lie between 0 (never reuse) and 1, not at {self.threshold}.")
        if self.max_consecutive is not None and (type(self.max_consecutive) is not int or self.max_consecutive < 1):
            raise ValueError(f"max_consecutive must be 1 or more, or None for no cap, not {self.max_consecutive!r}.")
        forecasts.check(self.forecast)

    @property
    def corrects(self) -> bool:
        """Whether a correction may act: left open, it belongs to every forecast but `none`."""
        wanted = self.forecast != "none" if self.correction is None else self.correction
        return wanted and self.threshold > 0
