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
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .denoiser import Denoiser, UNetDenoiser
from .forecast import Forecast, History
from .patching import Call
from .strategy import CacheReport, IncompatibleDenoiser


@dataclass(slots=True)
class Recorder:
    """A strategy under which every call computes, and what a branch would have kept of it is remembered.

    branch: as in `UNetDenoiser`; None for the prediction itself.
    """

    name: ClassVar[str] = "recorder"

    branch: int | None
    runs: list[Tensor] = field(default_factory=list)  # of each run: (batch entries, calls, calls), see `embedded`
    timesteps: list[float] = field(default_factory=list)  # of the last run's calls

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """Raises IncompatibleDenoiser and AlreadyAttached."""
        if not isinstance(denoiser, UNetDenoiser):
            raise IncompatibleDenoiser(f"{type(denoiser.root).__name__} is no UNet: there are no branches to record.")
        report = CacheReport(self.name, settings={"branch": self.branch})
        states: list[Tensor] = []
        self.timesteps = []

        def keep(module: object, inputs: object, output: Any) -> None:
            state = output if isinstance(output, Tensor) else output[0]  # of a tuple or of diffusers' output
            states.append(state.detach().flatten(1).half().cpu())

        def handle(call: Call) -> Any:
            output = call.run()
            self.timesteps.append(denoiser.timestep_of(call))
            report.record("C")
            return output

        source = denoiser.root if self.branch is None else denoiser.source(self.branch)
        hook = source.register_forward_hook(keep)
        try:
            with denoiser.intercepted(handle):
                yield report
        finally:
            hook.remove()
        self.runs.append(embedded(torch.stack(states, dim=1)))


def embedded(states: Tensor) -> Tensor:
    """(batch, calls, size) → (batch, calls, calls) in float64: vectors with the same inner products."""
    products = torch.stack([entry.float() @ entry.float().T for entry in states]).double()
    values, vectors = torch.linalg.eigh(products)
    short: Tensor = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return short


class Search:
    """The best placements in runs that were recorded.

    states: (entries, calls, size), of all runs together. longest: of the gaps between two computed calls.
    """

    def __init__(self, states: Tensor, forecast: Forecast, longest: int) -> None:
        self.calls = states.shape[1]
        self.longest = min(longest, self.calls)
        self._errors = {
            anchors: self._reused(states, anchors, forecast) for anchors in _anchors(self.calls, self.longest)
        }

    def _reused(self, states: Tensor, anchors: tuple[int, ...], forecast: Forecast) -> list[float]:
        """Root mean square errors of the calls that follow the last of `anchors`, if none of them computes."""
        history = History(forecast)
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
