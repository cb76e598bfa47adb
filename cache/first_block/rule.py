"""What the first block's residual is held against, and so which items of a batch may reuse.

The published rule: by how much the residual differs from the one of the last computed call. With a forecast: by how
much it lies beside the line through the last two, summed over the calls since the last computed one. A residual that
moves on along its line is no error, since the others are taken along theirs; what each reused call adds to the state's
error is, and stays in it.

Nothing here runs a network: the same rule decides in a run and for recorded residuals (`tuning/threshold.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cache.forecast import Line
from cache.transfer import upload

from .settings import Settings


class Verdict(NamedTuple):
    """rows: the items that compute. changes: what was held against the threshold, of each item; not finite where there
    was nothing to compare with. ahead: how many calls each item has moved on along its line, 0 without a forecast.
    """

    rows: list[int]
    changes: list[float]
    ahead: list[float]


class Reference:
    """The residuals of each item's last computed calls (items, tokens, channels), and what was spent since."""

    def __init__(self, settings: Settings, call: int, probe: Tensor) -> None:
        self._threshold = settings.threshold
        self._cap = math.inf if settings.max_consecutive is None else settings.max_consecutive
        self._forecast = settings.forecast
        items = probe.shape[0]
        self._history = Line(items, self._forecast, witness=True)
        self._history.add(call, probe)
        self._scale = _means(probe.abs())  # mean |residual| of each item
        self._streak = [0] * items  # reused calls in a row
        self._spent = [0.0] * items  # with a forecast: what the reused calls since the last computed one left of it

    @property
    def bytes(self) -> int:
        return self._history.bytes + self._scale.nbytes

    def judge(self, call: int, probe: Tensor, *, last: bool = False) -> Verdict:
        """Decide for call number `call`, in which the first block added `probe`. The last one of a run computes."""
        history = self._history
        moved, rest = history.ahead_of(probe, call)
        numbers = _means(rest.abs_()).div_(self._scale)
        ratios, ahead = torch.stack([numbers, moved.to(numbers.dtype)]).tolist()  # read at once: the host waits
        changes = [spent + ratio for spent, ratio in zip(self._spent, ratios, strict=True)]
        rows = []
        for row, change in enumerate(changes):
            reuse = not last and change < self._threshold and self._streak[row] < self._cap  # false for NaN
            self._streak[row] = self._streak[row] + 1 if reuse else 0
            self._spent[row] = change if reuse and self._forecast else 0.0
            if not reuse:
                rows.append(row)
            if not math.isfinite(change):
                history.forget(row)
        return Verdict(rows, changes, ahead)

    def keep(self, call: int, probe: Tensor, items: Sequence[int] | None, rows: Tensor | None = None) -> None:
        """Take `probe` for the reference of `items`, or of all. rows: `items` as an index on the device."""
        if items is None:
            self._history.add(call, probe)
            self._scale = _means(probe.abs())
        else:
            rows = upload(torch.tensor(items), probe.device) if rows is None else rows
            self._history.add(call, probe[rows], items, rows)
            self._scale[rows] = _means(probe[rows].abs_())


def _means(sizes: Tensor) -> Tensor:
    """Mean of each item, taken item by item: a mean over a batch rounds otherwise."""
    return sizes.mean().view(1) if sizes.shape[0] == 1 else torch.stack([item.mean() for item in sizes])
