"""What a diffusers sampler makes of each prediction, and how a computed call repays what the reused ones got wrong.

A reused call's prediction is a forecast. Once the next call computes, the predictions in between could be interpolated
instead, which is far nearer to the truth, but the sampler has gone on with what it was told. So the computed call's
answer is changed by what the sampler, frozen from here on, would have made of the difference:

    ε'[j] = ε[j] + Σ r[k] / r[j] · (p(k) - ε̂[k])        over the reused calls k since the last computed one,

with ε̂[k] what was answered at k, p a polynomial in (1 + call)^0.7 through ε[j] and the computed predictions before it
(two, at most; predictions bend most in a run's first calls, and less in that coordinate than over the calls), and r[k]
the response of the final latent to a unit of prediction at call k (`responses`). It is the corrector of a
predictor-corrector solver (UniPC, Zhao et al. 2023, arXiv:2302.04867, section 3.2), as that one without another
evaluation.

p is a parabola where it owes less than the line through the newest two of its predictions, for each batch item, and
that line otherwise: a forecast, which did not know ε[j], and a line that does are near each other by being right, where
forecasts are good and the predictions bend in ways that no parabola follows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .prediction import Diffusion, FlowMatching, Level, Prediction, prediction_of, setting
from .transfer import upload
from .views.base import Decision, Response, Responses, predicted, with_prediction

# Of clean latents, their standard deviation, as a response takes it. A diffusion's is σ_data of Karras et al. 2022,
# "Elucidating the Design Space", section 5. A flow's next to nothing: its estimate of the clean latents stays where it
# is, and errors of the latents go with the noise, but for its last call. docs/decisions/other-models.md.
SPREAD = 0.5
SPREAD_OF_FLOW = 0.01
SMALL = 1e-3  # a prediction that no scheduler clips
EVEN = 1.5  # of timesteps: the longest step by the mean one, at most

LIGHTEST = 2.0  # a call repays others that weigh up to so many times as much, in the mean
LONG = 3  # reused calls in a row
# Of a long row, what is repaid to a multistep sampler. One of second order takes a changed prediction 3/2 times in its
# next step and takes half of it back in the one after (Adams and Bashforth), so that 2/3 of what is owed moves the next
# call's latents by all of it. By measurement: whole in shorter rows. docs/decisions/responses.md.
SHARE = 2 / 3
ANCHORS = 2  # computed predictions that are kept; with the new one, a parabola
PACE = 0.7  # of the coordinate, by measurement: docs/decisions/correction.md

# Of diffusers' schedulers those that step by the predictions alone, as far as their settings draw no noise either. Two
# more do: LMS weighs four predictions with alternating signs, and gained nothing; DPM2's calls move the result to and
# fro, so that none repays its neighbours: docs/decisions/responses.md.
FOLLOWING = {
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
}


def timesteps_of(scheduler: Any, first: float) -> list[float] | None:
    """Those at which a diffusers pipeline calls its denoiser in a run that begins at `first`.

    None if that is not where the scheduler's timesteps begin: img2img runs a part of them.
    """
    timesteps = _timesteps(scheduler)
    return timesteps if timesteps and timesteps[0] == first else None


def _timesteps(scheduler: Any) -> list[float]:
    """Those of a diffusers scheduler, none for one of somebody's own that has other things in their place."""
    timesteps = getattr(scheduler, "timesteps", None)
    known: list[float] = timesteps.tolist() if isinstance(timesteps, Tensor) and timesteps.dim() == 1 else []
    return known if all(map(math.isfinite, known)) else []


def is_even(timesteps: Sequence[float]) -> bool:
    """Whether the steps between the timesteps of a run are about as long as each other."""
    steps = [abs(later - earlier) for earlier, later in pairwise(timesteps)]
    return not steps or max(steps) * len(steps) <= EVEN * sum(steps)


def follows(scheduler: Any) -> bool:
    """Whether the scheduler's type and settings say that its steps follow from the predictions alone.

    What has a `step` of its own, as somebody's subclass may, is not known.
    """
    owner = next((kind for kind in type(scheduler).__mro__ if "step" in vars(kind)), object)
    if owner.__name__ not in FOLLOWING or not owner.__module__.startswith("diffusers."):
        return False
    noisy = "sde" in str(setting(scheduler, "algorithm_type")) or setting(scheduler, "stochastic_sampling")
    return not noisy and not setting(scheduler, "thresholding")  # which looks at all of a picture


def responses(scheduler: Any) -> Response | None:
    """By how much a change of each remaining call's prediction moves the final latent, and by what kind of sampler.

    What the later calls make of it counts: a network takes a part of the change for noise and removes it. How much is
    here what the best network for Gaussian pictures of a spread does (`spread_of`). In noise of more than the spread a
    change shrinks as the noise does (the estimate of the clean latents stays), below it stays.

    scheduler: a diffusers scheduler whose timesteps are set, before its next step. None where that is not known
    beforehand (`follows`); where two calls share a timestep, as a prediction is no function of the call's number then;
    and where a diffusion's timesteps are not even, as to repay lost there about as often as it won
    (docs/decisions/responses.md).
    """
    if not follows(scheduler) or not _timesteps(scheduler):
        return None
    remaining = scheduler.timesteps[begun(scheduler) :].cpu()
    calls = len(remaining)
    if calls > len(set(remaining.tolist())):
        return None
    prediction = prediction_of(scheduler)
    if isinstance(prediction, Diffusion) and not is_even(remaining.tolist()):
        return None
    unit, spread = (
        scheduler.config.num_train_timesteps if isinstance(prediction, FlowMatching) else 1,
        spread_of(prediction),
    )

    def likely(x: Tensor, timestep: Tensor) -> Tensor:
        level = prediction.at(float(timestep) / unit)
        return prediction.output(x, _likely(level, spread) * x, level)

    *_, found = _moved(scheduler, remaining, likely)
    multistep = (setting(scheduler, "solver_order") or 1) > 1
    return Response(tuple(found.tolist()), multistep) if found.isfinite().all() else None


def steps_of(scheduler: Any) -> Tensor | None:
    """(calls, calls), float64: how much of each remaining call's prediction the latent after each step holds.

    Exactly, where `responses` supposes what a network would make of a change. scheduler, and where it is None: as
    there, but for uneven timesteps, which do no harm here.
    """
    if not follows(scheduler) or not _timesteps(scheduler):
        return None
    remaining = scheduler.timesteps[begun(scheduler) :].cpu()
    if len(remaining) > len(set(remaining.tolist())):
        return None
    return torch.stack(list(_moved(scheduler, remaining, lambda x, timestep: torch.zeros_like(x))))


def _moved(scheduler: Any, timesteps: Tensor, network: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
    """After each step the latent (calls,), by what a unit of each call's prediction more than the network's moves it.

    network: from its input and the timestep to its prediction.
    """
    stepper = stepping_copy(scheduler)
    sample = torch.zeros(1, len(timesteps), 1, 1, dtype=torch.float64)  # in channel k, call k has another prediction
    for call, timestep in enumerate(timesteps):
        x = stepper.scale_model_input(sample, timestep) if hasattr(stepper, "scale_model_input") else sample
        output = network(x, timestep)
        output[:, call] += SMALL
        sample = stepper.step(output, timestep, sample, return_dict=False)[0]
        yield sample.flatten() / SMALL


def spread_of(prediction: Prediction) -> float:
    """The standard deviation of clean latents that a response takes for granted."""
    return SPREAD_OF_FLOW if isinstance(prediction, FlowMatching) else SPREAD


def _likely(level: Level, spread: float) -> float:
    """The share of a latent that is the estimate of the clean one, for clean latents of this standard deviation."""
    return level.alpha * spread**2 / ((level.alpha * spread) ** 2 + level.sigma**2)


def stepping_copy(scheduler: object) -> Any:
    """The scheduler as it is now, on the CPU, to be stepped apart: what shadows its methods (previews) stays behind."""
    kind = type(scheduler)
    other = object.__new__(kind)
    for name, value in vars(scheduler).items():
        if not callable(getattr(kind, name, None)):
            vars(other)[name] = value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
    return other


def begun(scheduler: Any) -> int:
    """The first timestep of the run: img2img begins midway."""
    return getattr(scheduler, "step_index", None) or getattr(scheduler, "begin_index", None) or 0


@dataclass(slots=True)
class _Items:
    """Batch items that have computed at the same calls. rows: which of the batch; None for all."""

    rows: list[int] | None = None
    index: Tensor | None = None  # `rows` on the device
    computed: list[int] = field(default_factory=list)  # newest first
    reused: list[int] = field(default_factory=list)  # since then
    anchors: list[Tensor] = field(default_factory=list)  # the predictions of `computed`
    owed: Tensor | None = None  # Σ r[k] ε̂[k]


@dataclass(slots=True)
class Ledger:
    """What is remembered of a lane's calls: three tensors of the prediction's shape and two lists of call numbers."""

    shape: torch.Size | None = None
    began: int = 0  # the first call of this shape
    items: list[_Items] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        held = [tensor for items in self.items for tensor in (*items.anchors, items.owed) if tensor is not None]
        return sum(tensor.nbytes for tensor in held)


class Correction:
    """Remembers what a run's reused calls answered, and changes what its computed ones do.

    responses: asked after the run's first call, when the sampler knows its steps and has not made one. acted: whether
    any call has repaid something.
    """

    def __init__(self, responses: Responses) -> None:
        self._ask = responses
        self.acted = False

    @cached_property
    def response(self) -> Response | None:
        """Of this run's sampler; None where it is not known, and nothing is corrected."""
        return self._ask()

    def ends_with(self, number: int) -> bool:
        """Whether call `number` of a lane is known to be its last. Not to be asked before the run's first call."""
        return self.response is not None and number == len(self.response.moves) - 1

    def after(self, number: int, decision: Decision, output: Any, ledger: Ledger) -> Any:
        """What call `number` of a lane is to answer instead of `output`; noted in that lane's `ledger`."""
        response = self.response
        if response is None or (prediction := predicted(output)) is None:
            return output
        prediction = prediction.detach()
        if ledger.shape != prediction.shape:
            ledger.shape, ledger.began, ledger.items = prediction.shape, number, [_Items()]
        if number >= len(response.moves):
            return output
        if len(decision) > 1:
            ledger.items = [part for items in ledger.items for part in _parts(items, decision)]
        answer = prediction
        for items in ledger.items:
            own = prediction if items.index is None else prediction[items.index]
            if not decision[0 if items.rows is None else items.rows[0]]:
                _note(items, number, own, response.moves)
            elif (repaid := _repaid(items, number, ledger.began, own, response)) is not None:
                answer = repaid if items.index is None else answer.index_copy(0, items.index, repaid)
                self.acted = True
        return output if answer is prediction else with_prediction(output, answer)


def _note(items: _Items, number: int, prediction: Tensor, moves: Sequence[float]) -> None:
    """Remember what the reused call `number` answered."""
    if items.owed is None:
        items.owed = moves[number] * prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    else:
        items.owed.add_(prediction, alpha=moves[number])
    items.reused.append(number)


def _can_repay(reused: Sequence[int], number: int, moves: Sequence[float]) -> bool:
    """Whether call `number` acts as the reused ones did: between the calls of a second-order step signs change.

    A call whose own weight is small would have to exaggerate: its prediction would be no picture's any more.
    """
    own = moves[number]
    weights = [moves[call] * own for call in reused]
    return min(weights) > 0 and sum(weights) <= LIGHTEST * len(weights) * own**2


def _repaid(items: _Items, number: int, began: int, prediction: Tensor, response: Response) -> Tensor | None:
    """Keep the computed call's `prediction`; return what is to be answered in its place, if anything is owed."""
    known, anchors = [number, *items.computed], [prediction, *items.anchors]
    moves = response.moves
    answer: Tensor | None = None
    if items.owed is not None and items.computed and _can_repay(items.reused, number, moves):
        places = {call: _place(call - began) for call in (*known, *items.reused)}

        def owed(nodes: int) -> Tensor:
            """Σ r[k] (p(k) - ε̂[k]) with p through so many of the newest predictions."""
            at = [places[call] for call in known[:nodes]]
            weights = [(moves[call], lagrange(at, places[call])) for call in items.reused]
            found = torch.neg(told)
            for node, anchor in enumerate(anchors[:nodes]):
                found.add_(anchor, alpha=sum(move * share[node] for move, share in weights))
            return found

        told = items.owed
        part = SHARE if response.multistep and len(items.reused) >= LONG else 1.0
        change = _smaller(owed(len(known)), owed(len(known) - 1))
        answer = change.div_(moves[number] / part).add_(prediction).to(prediction.dtype)
    items.owed = None
    items.reused = []
    # The caller may write into what it is given, so that what is kept is not that very tensor.
    kept = prediction if answer is not None else prediction.clone()
    items.computed = known[:ANCHORS]
    items.anchors = [kept, *items.anchors][:ANCHORS]
    return answer


def _smaller(one: Tensor, other: Tensor) -> Tensor:
    """Of two tensors (items, …), for each item the one of the smaller norm; the first where they are level."""
    one_square, other_square = (tensor.float().square().flatten(1).sum(1) for tensor in (one, other))
    return torch.where((other_square < one_square).view(-1, *(1,) * (one.dim() - 1)), other, one)


def _parts(items: _Items, decision: Decision) -> list[_Items]:
    """The items, apart where some compute and others reuse. A batch of several is named row by row from then on."""
    rows = list(range(len(decision))) if items.rows is None else items.rows
    if len({decision[row] for row in rows}) == 1:
        return [items]
    parts = []
    for computes in (True, False):
        places = [place for place, row in enumerate(rows) if decision[row] == computes]
        device = items.anchors[0].device
        index, chosen = (upload(torch.tensor(which), device) for which in ([rows[at] for at in places], places))
        parts.append(
            _Items(
                [rows[place] for place in places],
                index,
                list(items.computed),
                list(items.reused),
                [anchor[chosen] for anchor in items.anchors],
                None if items.owed is None else items.owed[chosen],
            )
        )
    return parts


def _place(call: int) -> float:
    """The polynomial's coordinate of a call, counted from the first of its lane at its size."""
    return math.pow(1 + call, PACE)


def lagrange(nodes: Sequence[float], at: float) -> list[float]:
    """The weights of values at `nodes` in the polynomial through them, at `at`."""
    return [math.prod((at - other) / (node - other) for other in nodes if other != node) for node in nodes]
