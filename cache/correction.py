"""What reused calls got wrong, repaid by the computed call that ends their gap.

A reused call's prediction is a forecast. Once the next call computes, the predictions in between could be interpolated
instead, which is far nearer to the truth, but the sampler has gone on with what it was told. So the computed call's
answer is changed by what the sampler, frozen from here on, would have made of the difference:

    ε'[j] = ε[j] + Σ r[k] / r[j] · (p(k) - ε̂[k])        over the reused calls k since the last computed one,

with ε̂[k] what was answered at k, p the polynomial in (1 + call)^0.7 through ε[j] and the computed predictions before it
(two, at most; predictions bend most in a run's first calls, and less in that coordinate than over the calls), and r[k]
the response of the final latent to a unit of prediction at call k (`cache/sampling.py`). It is the corrector of a
predictor-corrector solver (UniPC, Zhao et al. 2023, arXiv:2302.04867, section 3.2), as that one without another
evaluation.

The state of a run: three tensors of the prediction's shape and two lists of call numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .forecast import Forecast
from .patching import Call, answer_of
from .strategy import CacheReport

LIGHTEST = 2.0  # a call repays others that weigh up to so many times as much, in the mean
ANCHORS = 2  # computed predictions that are kept; with the new one, a parabola
PACE = 0.7  # of the coordinate, by measurement: docs/decisions/correction.md


@dataclass(slots=True)
class _Items:
    """Batch items that have computed at the same calls. rows: which of the batch; None for all."""

    rows: Tensor | None
    computed: list[int] = field(default_factory=list)  # newest first
    reused: list[int] = field(default_factory=list)  # since then
    anchors: list[Tensor] = field(default_factory=list)  # the predictions of `computed`
    owed: Tensor | None = None  # Σ r[k] ε̂[k]

    @property
    def bytes(self) -> int:
        held = self.anchors if self.owed is None else [*self.anchors, self.owed]
        return sum(tensor.nbytes for tensor in held)


@dataclass(slots=True)
class _Pass:
    """One pass of a run (conditional, unconditional, or both at once) at one size."""

    shape: torch.Size
    calls: int  # so far, at all sizes
    began: int  # the first call at this size
    items: list[_Items] = field(default_factory=lambda: [_Items(None)])


def wanted(correction: bool | None, forecast: Forecast) -> bool:
    """Left open, a correction belongs to every forecast but `none`, which stays what was published."""
    return forecast != "none" if correction is None else correction


class Correction:
    """Around a strategy's handler of one run: remembers what reused calls answered, and changes what computed ones do.

    Acts where the denoiser's view knows the sampler's responses; `report.settings["correction"]` says whether it did.
    """

    def __init__(self, denoiser: Denoiser, report: CacheReport) -> None:
        self._denoiser = denoiser
        self._report = report
        self._responses: Sequence[float] | None = None
        self._begun = False
        self._passes: dict[str | None, _Pass] = {}

    def around(self, handle: Callable[[Call], Any]) -> Callable[[Call], Any]:
        """`handle` must note each call in the report before it returns."""

        def corrected(call: Call) -> Any:
            self._report.hold("correction", 0)  # noted anew after the call, beside what the strategy keeps by then
            try:
                return self._after(call, handle(call))
            except BaseException:  # also a cancel: what a stopped call has answered is not known
                self._passes.clear()
                raise

        return corrected

    def explain(self, asked: bool) -> None:
        """Say that nothing was corrected, where that was asked for."""
        if asked and self._begun and self._responses is None:
            self._report.warn("Nothing was corrected: what this sampler makes of a prediction is not known beforehand.")

    def _after(self, call: Call, output: Any) -> Any:
        if not self._begun:  # the sampler knows its steps by now, and has not made the first
            self._begun = True
            self._responses = self._denoiser.responses()
            self._report.settings["correction"] = self._responses is not None
        if self._responses is None:
            return output
        prediction = output[0].detach()  # of a tuple or of diffusers' output, which can be indexed as one
        entry = self._passes.get(call.pass_name)
        if entry is None or entry.shape != prediction.shape:
            began = 0 if entry is None else entry.calls
            entry = _Pass(prediction.shape, began, began)
            self._passes[call.pass_name] = entry
        number = entry.calls
        entry.calls += 1
        if number >= len(self._responses):
            return output
        letters = self._report.newest
        if len(letters) > 1:
            entry.items = [part for items in entry.items for part in _parts(items, letters)]
        answer = prediction
        for items in entry.items:
            reuses = letters[0 if items.rows is None else int(items.rows[0])] == "R"
            own = prediction if items.rows is None else prediction[items.rows]
            if reuses:
                self._reused(items, number, own)
            elif (repaid := self._computed(items, number, entry.began, own)) is not None:
                answer = repaid if items.rows is None else answer.index_copy(0, items.rows, repaid)
        self._report.hold("correction", sum(items.bytes for one in self._passes.values() for items in one.items))
        return output if answer is prediction else answer_of(type(output), answer)

    def _reused(self, items: _Items, number: int, prediction: Tensor) -> None:
        assert self._responses is not None
        if items.owed is None:
            items.owed = self._responses[number] * prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        else:
            items.owed.add_(prediction, alpha=self._responses[number])
        items.reused.append(number)

    def _can_repay(self, reused: Sequence[int], number: int) -> bool:
        """Whether call `number` acts as the reused ones did: between the calls of a second-order step signs change.

        A call whose own weight is small would have to exaggerate: its prediction would be no picture's any more.
        """
        assert self._responses is not None
        own = self._responses[number]
        weights = [self._responses[call] * own for call in reused]
        return min(weights) > 0 and sum(weights) <= LIGHTEST * len(weights) * own**2

    def _computed(self, items: _Items, number: int, began: int, prediction: Tensor) -> Tensor | None:
        """Keep `prediction`; return what is to be answered in its place, if anything is owed."""
        assert self._responses is not None
        known, anchors = [number, *items.computed], [prediction, *items.anchors]
        answer: Tensor | None = None
        if items.owed is not None and items.computed and self._can_repay(items.reused, number):
            owed = items.owed.neg_()
            places = [_place(call - began) for call in known]
            shares = [lagrange(places, _place(call - began)) for call in items.reused]
            for node, anchor in enumerate(anchors):
                weight = sum(
                    self._responses[call] * share[node] for call, share in zip(items.reused, shares, strict=True)
                )
                owed.add_(anchor, alpha=weight)
            answer = owed.div_(self._responses[number]).add_(prediction).to(prediction.dtype)
        items.owed = None
        items.reused = []
        # The caller may write into what it is given, so that what is kept is not that very tensor.
        kept = prediction if answer is not None else prediction.clone()
        items.computed = known[:ANCHORS]
        items.anchors = [kept, *items.anchors][:ANCHORS]
        return answer


def _parts(items: _Items, letters: str) -> list[_Items]:
    """The items, apart where some compute and others reuse."""
    if len(set(letters)) == 1 and items.rows is None:
        return [items]
    rows = list(range(len(letters))) if items.rows is None else items.rows.tolist()
    if len({letters[row] for row in rows}) == 1:
        return [items]
    parts = []
    for letter in "CR":
        places = [place for place, row in enumerate(rows) if letters[row] == letter]
        parts.append(
            _Items(
                torch.tensor([rows[place] for place in places], device=items.anchors[0].device),
                list(items.computed),
                list(items.reused),
                [anchor[places] for anchor in items.anchors],
                None if items.owed is None else items.owed[places],
            )
        )
    return parts


def _place(call: int) -> float:
    """The polynomial's coordinate of a call, counted from the first of its pass at its size."""
    return math.pow(1 + call, PACE)


def lagrange(nodes: Sequence[float], at: float) -> list[float]:
    """The weights of values at `nodes` in the polynomial through them, at `at`."""
    return [math.prod((at - other) / (node - other) for other in nodes if other != node) for node in nodes]
