"""Which calls of a run should compute, and how its predictions are weighed, so that the latents stay an uncached run's.

A sampler whose steps follow from the predictions alone is linear in them: with m[j, i] what prediction i does to the
latent after step j (`cache/solver.py`, `steps_of`), answers p instead of the uncached predictions v leave the error

    e[j] = Σ m[j, i] (p[i] - v[i])        over i ≤ j.

Call after call, the weights of p[j] in the predictions computed by then are those with the least |e[j]|², summed over
some pictures: an ordinary least-squares problem, for which the inner products of all predictions are enough. What has
gone wrong by then is repaid by it as far as the known predictions span it.

A network that is shown a latent which is off by e answers something else than the uncached prediction. What it answers
only drawing shows; a search supposes v + along e + across |e| r, with r of length one and at a right angle to all that
is known. The two numbers of each call are measured in runs that were drawn (`Response`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache.deepcache.schedule import warped

LOOKS_BACK = 6  # predictions that a call is a sum of, at most: docs/decisions/fitted.md
GROWTHS = (1.0, 1.2, 1.4)  # of the placements that a search begins with
RIDGE = 1e-8  # of the mean square of the predictions: keeps weights finite where these are all but the same
FARTHEST = 2  # calls that one computed call is moved by at a time
FELT = 1e-7  # |e|² beside that of a prediction: below, what a network makes of it is lost in its rounding


@dataclass(frozen=True, slots=True)
class Fit:
    """computed, weights: as `FittedForecast` takes them. error: |e|² of the last latent."""

    computed: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    error: float


@dataclass(frozen=True, slots=True)
class Response:
    """What a network answers to a latent that is off by e, call by call: along e, and across it."""

    along: tuple[float, ...]
    across: tuple[float, ...]

    @classmethod
    def measured(cls, runs: Sequence[tuple[Tensor, Fit]], moves: Tensor) -> Response:
        """runs: that were drawn, their inner products with their own predictions, and what they were drawn with.

        Calls that computed in none lie on a line between their neighbours; nothing is felt where no run was off.
        """
        felt: dict[int, Tensor] = {}  # of each call: what the change has of e, |change|², |e|²
        for products, fit in runs:
            differences = _differences(fit, len(moves))
            for number, call in enumerate(fit.computed[1:], start=1):
                off = moves[call - 1] @ differences
                change = torch.zeros_like(off)
                change[len(moves) + number], change[call] = 1, -1
                both = torch.stack([change, off])
                (size, along), (_, error) = (both @ products @ both.T).tolist()
                if error > FELT * float(products[call, call]):
                    felt[call] = felt.get(call, 0) + torch.tensor([along, size, error])
        if not felt:
            return cls.none(len(moves))
        known = {call: (along / error, size / error) for call, (along, size, error) in sorted(felt.items())}
        along, all_of_it = (
            np.interp(range(len(moves)), list(known), [float(one[which]) for one in known.values()]) for which in (0, 1)
        )
        return cls(tuple(along.tolist()), tuple(np.sqrt(np.maximum(0, all_of_it - along**2)).tolist()))

    @classmethod
    def none(cls, calls: int) -> Response:
        """Of a network that does not mind."""
        return cls((0.0,) * calls, (0.0,) * calls)

    @property
    def astray(self) -> Response:
        """As large, and none of it along what is off, which a search could count on."""
        return Response((0.0,) * len(self.along), tuple(map(math.hypot, self.along, self.across)))


def products(uncached: Tensor, own: Tensor | None = None) -> Tensor:
    """The inner products of an uncached run's predictions (calls, …), and of `own` (computed, …), behind them.

    Those of several pictures are to be added up. Float64.
    """
    rows = uncached.flatten(1) if own is None else torch.cat([uncached.flatten(1), own.flatten(1)])
    return rows.double() @ rows.double().T


def fitted(products: Tensor, moves: Tensor, computed: Sequence[int], response: Response | None = None) -> Fit:
    """The weights for those computed calls.

    products: with the predictions of the computed calls behind the uncached ones; without, those are what `response`
    makes of the uncached ones, which stand for them if it is None. moves: (calls, calls), as `steps_of` gives them.
    """
    calls, size = len(moves), len(moves) + len(computed)
    response = response or Response.none(calls)
    known = len(products) == size
    whole = products if known else products.new_zeros(size, size)
    whole[:calls, :calls] = products[:calls, :calls]
    differences = products.new_zeros(calls, size)  # p[i] - v[i], in terms of all predictions
    off = products.new_zeros(size)  # the latent's error so far, in the same terms
    rows, count = [], 0
    for call in range(calls):
        if call in computed:
            if not known:
                _answer(whole, calls + count, call, off, response)
            count += 1
        used = list(range(calls + max(0, count - LOOKS_BACK), calls + count))
        wanted = -(moves[call, :call] / moves[call, call]) @ differences[:call]
        wanted[call] += 1
        among = whole[used][:, used]
        ridge = RIDGE * among.diagonal().mean() * torch.eye(len(used), dtype=among.dtype)
        row = torch.linalg.solve(among + ridge, whole[used] @ wanted)
        differences[call, used] = row
        differences[call, call] -= 1
        rows.append(tuple(row.tolist()))
        off = moves[call, : call + 1] @ differences[: call + 1]
    return Fit(tuple(computed), tuple(rows), float(off @ whole @ off))


def _answer(products: Tensor, index: int, call: int, off: Tensor, response: Response) -> None:
    """Write the inner products of what a network answers at `call` to a latent that is off, at `index`."""
    along, across, moved = response.along[call], response.across[call], products @ off
    size = float(off @ moved)
    products[index] = products[call] + along * moved
    products[:, index] = products[index]
    products[index, index] = products[call, call] + 2 * along * moved[call] + (along**2 + across**2) * size


def _differences(fit: Fit, calls: int) -> Tensor:
    """(calls, calls + computed): p[i] - v[i] of a run, in terms of the uncached predictions and its own."""
    differences = torch.zeros(calls, calls + len(fit.computed), dtype=torch.float64)
    for call, row in enumerate(fit.weights):
        end = calls + sum(one <= call for one in fit.computed)
        differences[call, end - len(row) : end] = torch.tensor(row, dtype=torch.float64)
        differences[call, call] -= 1
    return differences


def searched(products: Tensor, moves: Tensor, count: int, response: Response | None = None) -> Fit:
    """That many computed calls, moved one by one for as long as the error falls, from three placements.

    As if the network answered like `response`: only drawing shows what it does.
    """
    calls = len(moves)
    best: Fit | None = None
    for growth in GROWTHS:
        found = fitted(products, moves, warped(calls, count, growth), response)
        while (nearer := _nearer(products, moves, found, response)) is not None:
            found = nearer
        best = found if best is None or found.error < best.error else best
    assert best is not None
    return best


def _nearer(products: Tensor, moves: Tensor, found: Fit, response: Response | None) -> Fit | None:
    """The best of the neighbours, if it is nearer than `found`."""
    computed, calls = found.computed, len(moves)
    best = found
    for index in range(1, len(computed)):
        after = computed[index + 1] if index + 1 < len(computed) else calls
        for by in (step * sign for step in range(1, FARTHEST + 1) for sign in (1, -1)):
            if computed[index - 1] < computed[index] + by < after:
                moved = (*computed[:index], computed[index] + by, *computed[index + 1 :])
                other = fitted(products, moves, moved, response)
                best = other if other.error < best.error else best
    return None if best is found else best


def unmixed(answers: Tensor, fit: Fit) -> Tensor:
    """(calls, …) that a fitted forecast answered → (computed, …), the network's own predictions among them."""
    own: list[Tensor] = []
    for call in fit.computed:
        *before, last = fit.weights[call]
        rest = answers[call].double()
        for weight, prediction in zip(before, own[len(own) - len(before) :], strict=True):
            rest = rest - weight * prediction
        own.append(rest / last)
    return torch.stack(own)
