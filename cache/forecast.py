"""Forecasts: what a kept tensor will be at a call that does not compute it.

A polynomial through the values that were computed last, in Newton's form over the call index: with a > b > c the last
calls that computed,

    p(q) = f[a] + (q - a) f[a, b] + (q - a)(q - b) f[a, b, c],

where f[a] is the value at a and f[a, b] = (f[a] - f[b]) / (a - b) and so on are divided differences. The first term
alone is plain reuse. TaylorSeer (Liu et al. 2025, arXiv:2503.06923) forecasts a transformer's features this way.

`damped` is linear with a slope that is trusted as far as the one before it held. At a computing call the last forecast
can be judged for free: of a slope d the next one, e, kept the part β = ⟨d, e⟩ / ⟨d, d⟩, limited to 0 … 1. The slope is
then taken (1 + β) / 2 times, half while there is none before it. Features bend most in a run's first calls, where the
full slope does worse than none. On a signal that is a line β is 1.

`probe` is linear as well, but asks a witness how far to go: a second tensor that is known at every call, the first
block's residual. `History.ahead_of` says how many calls beyond its last kept value that one has moved along its own
line, and the tensors that are not known are taken as far along theirs (`History.along`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Forecast = Literal["none", "linear", "quadratic", "damped", "probe"]
ORDERS: dict[Forecast, int] = {"none": 0, "linear": 1, "quadratic": 2, "damped": 1, "probe": 1}
WITHOUT_WITNESS = tuple(name for name in ORDERS if name != "probe")
"""Those that need nothing but the kept tensor and the number of the call."""

FASTEST = 2.0  # steps along a line that a witness may be believed for each call


def check(forecast: Any, known: Sequence[str] = tuple(ORDERS)) -> None:
    """Raises ValueError for what is none of `known`."""
    if forecast not in tuple(known):
        raise ValueError(f"forecast must be one of {', '.join(known)}, not {forecast!r}.")


class History:
    """The last computed values of a tensor, as divided differences: a forecast is one multiply-add an order.

    Exact for values that are a polynomial of the forecast's order in the call index (`damped`: a line, from the third
    value on); with fewer values the order is lower. Keeps one tensor for `none`, two for `linear` and `damped`, three
    for `quadratic`.

    items: 1 for a tensor that is always computed as a whole; else the size of its first dimension, whose items may be
        computed at calls of their own.
    witness: whether `ahead_of` will be asked.
    """

    def __init__(self, forecast: Forecast, items: int = 1, *, witness: bool = False) -> None:
        self._order = ORDERS[forecast]
        self._calls: list[list[int]] = [[] for _ in range(items)]  # of each item, newest first
        self._terms: list[Tensor] = []  # f[a], f[a, b], f[a, b, c]; an item with fewer values has zeros
        self._is_damped = forecast == "damped"
        self._trust: Tensor | None = None  # what of the slope is taken, for each entry of the first dimension
        self._is_witness = witness
        self._square: Tensor | None = None  # of a witness: ⟨slope, slope⟩ of each item

    @property
    def newest(self) -> Tensor:
        """The values computed last, which is the very tensor that was given where all items were."""
        return self._terms[0]

    @property
    def bytes(self) -> int:
        """What is held, to the last number."""
        held = [*self._terms, self._trust, self._square]
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def at(self, call: int, onto: Tensor | None = None) -> Tensor:
        """The forecast for `call`, added to `onto`. With one value known and no `onto`, that tensor itself."""
        value = self._terms[0] if onto is None else self._terms[0] + onto
        for order, difference in enumerate(self._terms[1:], 1):
            weights = [math.prod(call - anchor for anchor in anchors[:order]) for anchors in self._calls]
            weight = _by_item(weights, difference)
            if self._trust is not None:
                weight = self._trust * weight
            value = _plus(value, difference, weight, in_place=order > 1 or onto is not None)
        return value

    def ahead_of(self, value: Tensor, call: int) -> tuple[Tensor, Tensor]:
        """How many calls beyond its newest value each item's line comes nearest to `value` (items,), and the rest.

        The least-squares step along the line: 0 where there is no line yet or none that moves, never back, and at most
        FASTEST times the calls from the newest value to `call`, where a line that hardly moves would say anything. The
        rest is `value` less that point of the line, in float at least. Both lie on the device: the host waits for none.
        """
        import torch

        from .transfer import upload

        rest = value - self._terms[0]
        if self._square is None:
            return rest.new_zeros(len(self._calls), dtype=torch.float32), rest
        slope = self._terms[1]
        farthest = [FASTEST * (call - anchors[0]) if anchors else 0.0 for anchors in self._calls]
        product = _products(rest, slope)
        bound = upload(torch.tensor(farthest, dtype=product.dtype), product.device)
        moves = (self._square > 0) & (product > 0)  # false for NaN
        ahead = torch.where(moves, (product / self._square).minimum(bound), 0)
        rest = rest.to(torch.promote_types(rest.dtype, ahead.dtype))
        return ahead, rest.addcmul_(slope.to(rest.dtype), _column(ahead.to(rest.dtype), rest), value=-1)

    def along(self, ahead: Sequence[float], onto: Tensor | None = None) -> Tensor:
        """Each item's line `ahead` calls beyond its newest value, added to `onto`."""
        value = self._terms[0] if onto is None else self._terms[0] + onto
        if len(self._terms) < 2:
            return value
        slope = self._terms[1]
        return _plus(value, slope, _by_item(ahead, slope), in_place=onto is not None)

    def make_room(self) -> None:
        """Let go of what the next value will not need, so that the old and the new are not held at once."""
        del self._terms[self._order + self._is_damped :]

    def add(self, call: int, value: Tensor, items: Sequence[int] | None = None, rows: Tensor | None = None) -> None:
        """Keep `value` as that of `call`: of all items, or, with one row for each of them, of those in `items`.

        The first value is that of all. rows: `items` as an index on the device; made if it is not given.
        """
        if items is not None and rows is None:
            import torch

            from .transfer import upload

            rows = upload(torch.tensor(items), value.device)
        items = range(len(self._calls)) if items is None else items
        known = [self._calls[item] for item in items]
        new = [value]
        for order in range(min(self._order, max(map(len, known)))):
            old = self._terms[order] if rows is None else self._terms[order][rows]
            # Nothing known so far back is a value infinitely far away: no difference.
            gaps = [call - anchors[order] if order < len(anchors) else math.inf for anchors in known]
            difference = new[-1] - old
            new.append(difference.div_(_by_item(gaps, difference)))
        if self._is_damped and len(new) > 1:
            self._judge(new[1], rows)
        if rows is None:
            self._terms = new
        else:
            for order, part in enumerate(new):
                if order == len(self._terms):
                    self._terms.append(self._terms[0].new_zeros(self._terms[0].shape))
                self._terms[order][rows] = part
        for item in items:
            self._calls[item] = [call, *self._calls[item]][: self._order + 1]
        if self._is_witness and len(self._terms) > 1:
            self._square = _products(self._terms[1], self._terms[1])

    def _judge(self, slope: Tensor, rows: Tensor | None) -> None:
        """Set how far to trust `slope`, by how far the one before it held."""
        shape = (-1, *(1,) * (slope.dim() - 1))
        if len(self._terms) > 1:
            before = (self._terms[1] if rows is None else self._terms[1][rows]).flatten(1).float()
            held = (before * slope.flatten(1)).sum(1) / before.square().sum(1)  # float: in half precision sums overflow
            trust = (held.clamp(0, 1).nan_to_num(0) / 2 + 0.5).to(slope.dtype).view(shape)
        else:
            trust = slope.new_full((len(slope),), 0.5).view(shape)
        if rows is None:
            self._trust = trust
        else:
            if self._trust is None:
                self._trust = trust.new_full((len(self._calls),), 0.5).view(shape)
            self._trust[rows] = trust

    def forget(self, item: int) -> None:
        """Start the item anew: its values are not to be forecast from, being no numbers for instance."""
        self._calls[item] = []
        for term in self._terms:
            term[item].zero_()
        if self._square is not None:
            self._square[item] = 0


def _by_item(numbers: Sequence[float], like: Tensor) -> float | Tensor:
    """A number if the items share it, else a tensor of theirs that broadcasts over `like` (items, …)."""
    if len(set(numbers)) == 1:
        return numbers[0]
    import torch

    from .transfer import upload

    return _column(upload(torch.tensor(numbers, dtype=like.dtype), like.device), like)


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    """One number an item (items,), so that they broadcast over `like` (items, …)."""
    return numbers.view(-1, *(1,) * (like.dim() - 1))


def _products(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of each item of (items, …), in float at least: in half precision sums overflow."""
    return (one.float() * other.float()).flatten(1).sum(1)


def _plus(value: Tensor, difference: Tensor, weight: float | Tensor, *, in_place: bool) -> Tensor:
    if isinstance(weight, int | float):
        return value.add_(difference, alpha=weight) if in_place else value.add(difference, alpha=weight)
    return value.addcmul_(difference, weight) if in_place else value.addcmul(difference, weight)
