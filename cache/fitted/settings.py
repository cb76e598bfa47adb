"""What a fitted forecast is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache.strategy import CacheStrategy, NoCache

_UNCACHED = NoCache()


@dataclass(frozen=True, slots=True)
class Settings:
    """The answer of every call of a run, as a weighted sum of the predictions computed by then.

    computed: the calls in which the network runs, the first being 0.
    weights: of each call of the run, in order: those of the newest predictions, the newest last, this call's own
        included. A row may be shorter than what was computed by then, never longer.
    otherwise: what acts in runs that this was not fitted for: over a picture, in a part of the schedule, at two sizes.
    """

    name: ClassVar[str] = "fitted"

    computed: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    otherwise: CacheStrategy = _UNCACHED

    def __post_init__(self) -> None:
        calls = len(self.weights)
        if not self.computed or self.computed[0] != 0 or list(self.computed) != sorted(set(self.computed)):
            raise ValueError(f"computed must rise from 0, not {self.computed!r}.")
        if self.computed[-1] >= calls:
            raise ValueError(f"computed names call {self.computed[-1]}, and there are weights for {calls}.")
        for call, row in enumerate(self.weights):
            known = sum(one <= call for one in self.computed)
            if not 0 < len(row) <= known:
                raise ValueError(f"call {call} must have 1 to {known} weights, not {len(row)}.")

    @property
    def calls(self) -> int:
        """Of the run."""
        return len(self.weights)

    def __str__(self) -> str:
        return f"{self.name}, {len(self.computed)} of {self.calls} calls: {', '.join(map(str, self.computed))}"
