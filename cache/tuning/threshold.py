"""A threshold of the first-block cache for a wished speed-up, found from runs that computed everything.

The rule that decides needs the first block's residuals and no network (`first_block/rule.py`). A `ResidualRecorder`
keeps those of some uncached runs; which calls a threshold would have reused in them is then a matter of milliseconds,
and the lowest one that reaches the wish is searched by halving. What this leaves out: a cached run's latents are not
quite the uncached one's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from cache.errors import CacheError
from cache.first_block import FirstBlockCache
from cache.first_block.rule import Reference

from .recorder import ResidualRecorder

_HALVINGS = 14  # of the range of thresholds: finer than the four digits that are given out
_DIGITS = 4


class Unreachable(CacheError):
    """No threshold gives the wished speed-up."""


@dataclass(frozen=True, slots=True)
class Found:
    """A threshold and what the recorded runs let expect of it: hit rate, and speed-up by counted operations."""

    threshold: float
    hit_rate: float
    speedup: float


def decisions(residuals: Sequence[Tensor], settings: FirstBlockCache, *, ends: bool = False) -> list[str]:
    """The letters, of each item, that `settings` would have given a lane with these residuals of the first block.

    ends: whether the run would have known its last call, which a forecast does not take.
    """
    reference: Reference | None = None
    letters: list[str] = []
    for call, recorded in enumerate(residuals):
        residual = recorded.clone()  # a reference is written into where some items compute
        items = len(residual)
        if reference is None or settings.threshold == 0:
            rows = list(range(items))
            reference = reference or Reference(settings, call, residual)
            letters = letters or [""] * items
        else:
            last = ends and settings.forecast and call == len(residuals) - 1
            rows = reference.judge(call, residual, last=last).rows
            if rows:
                reference.keep(call, residual, None if len(rows) == items else rows)
        letters = [known + ("C" if row in rows else "R") for row, known in enumerate(letters)]
    return letters


def expected(recorder: ResidualRecorder, settings: FirstBlockCache) -> Found:
    """What `settings` would have saved in the recorded runs. Raises ValueError for none."""
    lines = [decisions(residuals, settings, ends=recorder.ends) for residuals in recorder.lanes]
    letters = "".join(itertools.chain(*lines))
    if not letters or recorder.reuse_cost is None:
        raise ValueError("nothing was recorded: run the network with the recorder attached first")
    reused = letters.count("R")
    cost = len(letters) - reused + reused * recorder.reuse_cost
    return Found(settings.threshold, reused / len(letters), len(letters) / cost)


def threshold_for(recorder: ResidualRecorder, speedup: float, settings: FirstBlockCache | None = None) -> Found:
    """The lowest threshold that gives `speedup` (above 1) in the recorded runs, all other settings as in `settings`.

    Raises Unreachable, which names the most that can be had, and ValueError.
    """
    if not speedup > 1:
        raise ValueError(f"a speed-up must be above 1, not {speedup}")
    settings = settings or FirstBlockCache()

    def at(threshold: float) -> Found:
        return expected(recorder, replace(settings, threshold=round(threshold, _DIGITS)))

    low, high = 0.0, 1.0
    best = at(high)
    if best.speedup < speedup:
        raise Unreachable(
            f"A speed-up of {speedup:.2f} is out of the first-block cache's reach here: even threshold 1 gives "
            f"{best.speedup:.2f}. Ask for less, or take more steps."
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = at(middle)
        if found.speedup < speedup:
            low = middle
        else:
            high, best = middle, found
    return best
