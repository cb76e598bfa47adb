"""Where the compute calls of a run should lie, from what its calls would have reused.

An uncached run shows every call's branch state, and so what a reuse at any call would get from any computed ones before
it and how wrong that is. What remains is to choose the calls, which dynamic programming does exactly. A forecast looks
back on at most three computed calls, so that the last three are the state of the search.

The states themselves are large and only their inner products matter: they are exchanged for short vectors with the same
ones, on which the forecast's own code then runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from cache.forecast import Damped


class Search:
    """The best placements in runs that were recorded.

    states: (entries, calls, size), of all runs together. longest: of the gaps between two computed calls.
    """

    def __init__(self, states: Tensor, forecast: bool, longest: int) -> None:
        self.calls = states.shape[1]
        self.longest = min(longest, self.calls)
        self._errors = {
            anchors: self._reused(states, anchors, forecast) for anchors in _anchors(self.calls, self.longest)
        }

    def _reused(self, states: Tensor, anchors: tuple[int, ...], forecast: bool) -> list[float]:
        """Root mean square errors of the calls that follow the last of `anchors`, if none of them computes."""
        history = Damped(forecast)
        for call in anchors:
            history.make_room()
            history.add(call, states[:, call])
        following = range(anchors[-1] + 1, min(anchors[-1] + self.longest, self.calls))
        return [float((history.at(call) - states[:, call]).square().sum(1).mean().sqrt()) for call in following]

    def best(self, budget: int, weights: Sequence[float]) -> tuple[int, ...] | None:
        """The `budget` calls that cost least; None if the longest gap is too short for so few.

        A gap costs the square of the sum of its reused calls' errors, each by its call's weight: within a gap they add
        up, from gap to gap they do not.
        """
        costs = {anchors: _gaps(errors, weights[anchors[-1] + 1 :]) for anchors, errors in self._errors.items()}
        found: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
        for _ in range(budget - 1):
            longer: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
            for anchors, (cost, computed) in found.items():
                for gap, added in enumerate(costs[anchors]):
                    call = anchors[-1] + 1 + gap
                    if call >= self.calls:
                        break
                    key = (*anchors, call)[-3:]
                    if key not in longer or cost + added < longer[key][0]:
                        longer[key] = (cost + added, (*computed, call))
            found = longer
        ends = [
            (cost + costs[anchors][-1], computed)
            for anchors, (cost, computed) in found.items()
            if self.calls - anchors[-1] <= self.longest
        ]
        return min(ends)[1] if ends else None


def _gaps(errors: Sequence[float], weights: Sequence[float]) -> list[float]:
    """What a gap costs that reuses 0, 1, 2, … calls."""
    return [total**2 for total in itertools.accumulate(map(float.__mul__, errors, weights), initial=0.0)]


def _anchors(calls: int, longest: int) -> Iterator[tuple[int, ...]]:
    """What can be the last three computed calls, or all of them where there are fewer, beginning with call 0."""
    yield (0,)
    for i in range(calls):
        for j in range(i + 1, min(i + longest, calls - 1) + 1):
            if i == 0:
                yield (i, j)
            for k in range(j + 1, min(j + longest, calls - 1) + 1):
                yield (i, j, k)
