"""Forecasts: what a kept tensor will be at a call that does not compute it.

Repeating the last value treats the tensor as constant. It moves, and mostly on, so a line goes through the values of
the last two calls that computed, a and b: f(a) + (q - a) d with the slope d = (f(a) - f(b)) / (a - b). TaylorSeer (Liu
et al. 2025, arXiv:2503.06923) forecasts a transformer's features this way. How far along it is asked in two ways.

`Damped` trusts a slope as far as the one before it held. At a computing call the last forecast can be judged for free:
of a slope d the next one, e, kept the part β = ⟨d, e⟩ / ⟨d, d⟩, limited to 0 … 1. The slope is then taken (1 + β) / 2
times, half while there is none before it. Features bend most in a run's first calls, where the full slope does worse
than none. On a signal that is a line β is 1.

`Line` asks a witness: a second tensor that is known at every call, the first block's residual. `ahead_of` says how many
calls beyond its last kept value that one has moved along its own line, and `along` takes those that are not known as
far along theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .transfer import upload

FASTEST = 2.0  # steps along a line that a witness may be believed for each call


class _Kept:
    """The last value of a tensor (items, …) and its slope.

    forecast: whether a slope is kept; without one the last value is repeated.
    """

    def __init__(self, forecast: bool = True) -> None:
        self._forecast = forecast
        self._value: Tensor | None = None
        self._slope: Tensor | None = None
        self._weight: Tensor | None = None  # one number an item, made of its slope

    @property
    def newest(self) -> Tensor:
        """The value computed last, which is the very tensor that was given where all items were."""
        assert self._value is not None, "the first call computes all items"
        return self._value

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self._value, self._slope, self._weight) if tensor is not None)


class Damped(_Kept):
    """The slope is trusted as far as the one before it held, for each item."""

    _call = 0

    def at(self, call: int) -> Tensor:
        """The forecast for `call`. With one value known, that tensor itself."""
        if self._slope is None or self._weight is None:
            return self.newest
        return self.newest.addcmul(self._slope, self._weight * (call - self._call))

    def make_room(self) -> None:
        """Let go of what the next value will not need, so that the old and the new are not held at once."""
        if not self._forecast:
            self._value = None

    def add(self, call: int, value: Tensor) -> None:
        """Keep `value` as that of `call`."""
        if self._forecast and self._value is not None:
            slope = (value - self._value).div_(call - self._call)
            self._weight, self._slope = self._judged(slope), slope
        self._call, self._value = call, value

    def _judged(self, slope: Tensor) -> Tensor:
        """How far to trust `slope`, by how far the one before it held."""
        if self._slope is None:
            return _column(slope.new_full((len(slope),), 0.5), slope)
        held = _products(self._slope, slope) / _products(self._slope, self._slope)
        return _column((held.clamp(0, 1).nan_to_num(0) / 2 + 0.5).to(slope.dtype), slope)


class Line(_Kept):
    """Items may be computed at calls of their own; a slope is 0 while there is none.

    witness: whether `ahead_of` will be asked.
    """

    def __init__(self, items: int, forecast: bool = True, *, witness: bool = False) -> None:
        super().__init__(forecast)
        self._calls: list[int | None] = [None] * items  # of each item's value
        self._is_witness = witness  # its weight: ⟨slope, slope⟩

    def ahead_of(self, value: Tensor, call: int) -> tuple[Tensor, Tensor]:
        """How many calls beyond its newest value each item's line comes nearest to `value` (items,), and the rest.

        The least-squares step along the line: 0 where there is no line yet or none that moves, never back, and at most
        FASTEST times the calls from the newest value to `call`, where a line that hardly moves would say anything. The
        rest is `value` less that point of the line, in float at least. Both lie on the device: the host waits for none.
        """
        rest = value - self.newest
        if self._slope is None or self._weight is None:
            return rest.new_zeros(len(self._calls), dtype=torch.float32), rest
        farthest = [0.0 if anchor is None else FASTEST * (call - anchor) for anchor in self._calls]
        product = _products(rest, self._slope)
        bound = upload(torch.tensor(farthest, dtype=product.dtype), product.device)
        moves = (self._weight > 0) & (product > 0)  # false for NaN
        ahead = torch.where(moves, (product / self._weight).minimum(bound), 0)
        rest = rest.to(torch.promote_types(rest.dtype, ahead.dtype))
        return ahead, rest.addcmul_(self._slope.to(rest.dtype), _column(ahead.to(rest.dtype), rest), value=-1)

    def along(self, ahead: Sequence[float], onto: Tensor) -> Tensor:
        """Each item's line `ahead` calls beyond its newest value, added to `onto`."""
        value = self.newest + onto
        if self._slope is None:
            return value
        weight = _by_item(ahead, self._slope)
        if isinstance(weight, Tensor):
            return value.addcmul_(self._slope, weight)
        return value.add_(self._slope, alpha=weight)

    def add(self, call: int, value: Tensor, items: Sequence[int] | None = None, rows: Tensor | None = None) -> None:
        """Keep `value` as that of `call`: of all items, or, with one row for each of them, of those in `items`.

        The first value is that of all. rows: `items` as an index on the device.
        """
        members = range(len(self._calls)) if items is None else items
        known = [self._calls[item] for item in members]
        slope: Tensor | None = None
        if self._forecast and any(anchor is not None for anchor in known):
            # Nothing known is a value infinitely far away: no slope.
            gaps = [math.inf if anchor is None else call - anchor for anchor in known]
            slope = value - (self.newest if rows is None else self.newest[rows])
            slope.div_(_by_item(gaps, slope))
        if rows is None:
            self._value, self._slope = value, slope
        else:
            self.newest[rows] = value
            if slope is not None:
                if self._slope is None:
                    self._slope = torch.zeros_like(self.newest)
                self._slope[rows] = slope
        for item in members:
            self._calls[item] = call
        if self._is_witness:
            self._weight = None if self._slope is None else _products(self._slope, self._slope)

    def forget(self, item: int) -> None:
        """Start the item anew: its values are not to be forecast from, being no numbers for instance."""
        self._calls[item] = None
        for held in (self._value, self._slope, self._weight):
            if held is not None:
                held[item] = 0


def _by_item(numbers: Sequence[float], like: Tensor) -> float | Tensor:
    """A number if the items share it, else a tensor of theirs that broadcasts over `like` (items, …)."""
    if len(set(numbers)) == 1:
        return numbers[0]
    return _column(upload(torch.tensor(numbers, dtype=like.dtype), like.device), like)


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    """One number an item (items,), so that they broadcast over `like` (items, …)."""
    return numbers.view(-1, *(1,) * (like.dim() - 1))


def _products(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of each item of (items, …), in float at least: in half precision sums overflow."""
    return (one.float() * other.float()).flatten(1).sum(1)
