"""Which calls of a run should compute, and how its predictions are weighed, so that the latents stay an uncached run's.

A sampler whose steps follow from the predictions alone is linear in them: with m[j, i] what prediction i does to the
latent after step j (`cache/solver.py`, `steps_of`), answers p instead of the uncached predictions v leave the error

    e[j] = Σ m[j, i] (p[i] - v[i])        over i ≤ j.

Call after call, the weights of p[j] in the predictions computed by then are those with the least |e[j]|², summed over
some pictures: an ordinary least-squares problem, for which the inner products of all predictions are enough. What has
gone wrong by then is repaid by it as far as the known predictions span it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.deepcache.schedule import warped

LOOKS_BACK = 6  # predictions that a call is a sum of, at most: docs/decisions/fitted.md
GROWTHS = (1.0, 1.2, 1.4)  # of the placements that a search begins with
RIDGE = 1e-8  # of the mean square of the predictions: keeps weights finite where these are all but the same
FARTHEST = 2  # calls that one computed call is moved by at a time


@dataclass(frozen=True, slots=True)
class Fit:
    """computed, weights: as `FittedForecast` takes them. error: |e|² of the last latent."""

    computed: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    error: float


def products(uncached: Tensor, own: Tensor | None = None) -> Tensor:
    """The inner products of an uncached run's predictions (calls, …), and of `own` (computed, …), behind them.

    Those of several pictures are to be added up. Float64.
    """
    rows = uncached.flatten(1) if own is None else torch.cat([uncached.flatten(1), own.flatten(1)])
    return rows.double() @ rows.double().T


def fitted(products: Tensor, moves: Tensor, computed: Sequence[int]) -> Fit:
    """The weights for those computed calls.

    products: with the predictions of the computed calls behind the uncached ones; without, the uncached ones stand for
    them. moves: (calls, calls), as `steps_of` gives them.
    """
    calls = len(moves)
    if len(products) == calls:
        known = [*range(calls), *computed]
        products = products[known][:, known]
    differences = products.new_zeros(calls, len(products))  # p[i] - v[i], in terms of all predictions
    rows, error = [], 0.0
    for call in range(calls):
        count = sum(one <= call for one in computed)
        used = list(range(calls + max(0, count - LOOKS_BACK), calls + count))
        wanted = -(moves[call, :call] / moves[call, call]) @ differences[:call]
        wanted[call] += 1
        among = products[used][:, used]
        ridge = RIDGE * among.diagonal().mean() * torch.eye(len(used), dtype=among.dtype)
        row = torch.linalg.solve(among + ridge, products[used] @ wanted)
        differences[call, used] = row
        differences[call, call] -= 1
        rows.append(tuple(row.tolist()))
        left = moves[call, : call + 1] @ differences[: call + 1]
        error = float(left @ products @ left)
    return Fit(tuple(computed), tuple(rows), error)


def searched(products: Tensor, moves: Tensor, count: int) -> Fit:
    """That many computed calls, moved one by one for as long as the error falls, from three placements.

    As if the network answered the same to latents that are a little off: only drawing shows what it does.
    """
    calls = len(moves)
    best: Fit | None = None
    for growth in GROWTHS:
        found = fitted(products, moves, warped(calls, count, growth))
        while (nearer := _nearer(products, moves, found)) is not None:
            found = nearer
        best = found if best is None or found.error < best.error else best
    assert best is not None
    return best


def _nearer(products: Tensor, moves: Tensor, found: Fit) -> Fit | None:
    """The first of the neighbours that is nearer than `found`."""
    computed, calls = found.computed, len(moves)
    for index in range(1, len(computed)):
        after = computed[index + 1] if index + 1 < len(computed) else calls
        for by in (step * sign for step in range(1, FARTHEST + 1) for sign in (1, -1)):
            if computed[index - 1] < computed[index] + by < after:
                moved = (*computed[:index], computed[index] + by, *computed[index + 1 :])
                other = fitted(products, moves, moved)
                if other.error < found.error:
                    return other
    return None


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
