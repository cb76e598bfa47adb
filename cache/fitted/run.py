"""One run of a fitted forecast: the predictions that a lane keeps, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cache.report import CacheReport
from cache.run import Lane, Run
from cache.views.base import Call, Decision, Denoiser, answer_of, predicted

from .settings import Settings


@dataclass(slots=True)
class Kept:
    """The newest predictions that a lane computed, the newest last, and what they came in."""

    values: list[Tensor] = field(default_factory=list)
    form: type = tuple  # of the network's answers
    listed: bool = False  # whether those hold a list of items

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.values)


class FittedRun(Run):
    """The state of one run."""

    def __init__(self, settings: Settings, denoiser: Denoiser) -> None:
        said = {"computed_calls": list(settings.computed), "fitted_calls": settings.calls}
        super().__init__(denoiser, CacheReport(settings.name, said, reuse_cost=0.0), corrects=False)
        self.settings = settings
        self.longest = max(map(len, settings.weights))
        self.strange = 0  # calls that no weights were found for

    def step(self, call: Call, lane: Lane) -> tuple[Any, Decision]:
        settings, number = self.settings, lane.calls
        kept: Kept | None = Kept() if number == 0 else lane.kept.get(lane.size)
        if kept is None or number >= settings.calls:
            self.strange += 1
            return call.run(), (True,)
        computes = number in settings.computed
        if computes:
            output = call.run()
            if (prediction := predicted(output)) is None:  # items of unlike shapes
                self.strange += 1
                lane.kept.clear()
                return output, (True,)
            kept.form, kept.listed = type(output), isinstance(output[0], list)
            # Callers may change a prediction in place, so that it is kept as a copy.
            kept.values = [*kept.values, prediction.detach().clone()][-self.longest :]
            lane.kept[lane.size] = kept
        answer = weighted(kept.values, settings.weights[number])
        return answer_of(kept.form, list(answer.unbind()) if kept.listed else answer), (computes,)

    def explain(self) -> None:
        """Warn of calls that were computed as nothing is known of them."""
        if self.strange:
            self.report.warn(
                f"{self.strange} calls were computed: the cache was fitted for {self.settings.calls} calls of one size "
                "from the run's first on."
            )


def weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w v over the newest of `values`, as many as there are weights, summed in float at least."""
    newest = values[-len(weights) :]
    total = newest[-1].to(torch.promote_types(newest[-1].dtype, torch.float32)) * weights[-1]
    for value, weight in zip(newest[:-1], weights[:-1], strict=True):
        total.add_(value, alpha=weight)
    return total.to(newest[-1].dtype)
