"""The correction of reused calls: held against plain sampling loops and against finite differences."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from cache import CacheReport, DeepCache, Denoiser, FirstBlockCache, attach, solver, view_of
from cache.patching import shadowed
from cache.prediction import prediction_of
from cache.run import Lane, Run
from cache.solver import Correction, Ledger, lagrange, responses, spread_of
from cache.views.base import Call, Decision, Response
from tests.cache.networks import denoise_flux, denoise_unet, small_flux, small_unet

pytestmark = [  # diffusers' schedulers on NumPy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept"),
]

CALLS = 12
LINEAR_STEPS = [
    DDIMScheduler(clip_sample=False),
    DDIMScheduler(clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
    EulerDiscreteScheduler(),
    DPMSolverMultistepScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


def sampled(scheduler: Any, predict: Callable[[int, Tensor], Tensor], start: Tensor) -> Tensor:
    """What `scheduler` makes of the predictions for each of its calls."""
    scheduler.set_timesteps(CALLS)
    sample = start
    for number, timestep in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(predict(number, x), timestep, sample, return_dict=False)[0]
    return sample


def moved(scheduler: Any) -> list[float]:
    """By how much each call's prediction moves the final latent, where no prediction depends on the latents."""
    stepped = copy.deepcopy(scheduler)
    zero = torch.zeros(1, dtype=torch.float64)
    return [float(sampled(stepped, lambda number, _, at=at: zero + (number == at), zero)) for at in range(CALLS)]


class Scripted(Run):
    """Computes where `letters` say C, one letter for each item, and repeats its last answer where they say R."""

    def __init__(self, letters: list[str], truth: Callable[[int], Tensor], weights: Sequence[float] | None) -> None:
        known = None if weights is None else Response(weights)
        view = Denoiser(nn.Identity()).sampled(lambda: known)
        super().__init__(view, CacheReport("test"), corrects=True)
        self.letters, self.truth = letters, truth
        self.last = torch.tensor(torch.nan)

    def step(self, call: Call, lane: Lane) -> tuple[Any, Decision]:
        decision = tuple(letter == "C" for letter in self.letters[lane.calls])
        self.last = torch.where(torch.tensor(decision).view(-1, 1, 1, 1), self.truth(lane.calls), self.last)
        return (self.last.clone(),), decision

    def __call__(self, number: int, sample: Tensor) -> Tensor:
        answer: Tensor = self.handle(Call(lambda: None, (sample,), {}, None))[0]
        return answer


def corrected(letters: str, predictions: Sequence[Tensor], known: Response | None) -> list[Tensor]:
    """What is answered in place of one lane's predictions."""
    correction, ledger = Correction(lambda: known), Ledger()
    calls = enumerate(zip(letters, predictions, strict=True))
    return [correction.after(number, (letter == "C",), (own,), ledger)[0] for number, (letter, own) in calls]


@pytest.mark.parametrize("scheduler", LINEAR_STEPS, ids=lambda one: type(one).__name__)
def test_a_response_is_what_a_changed_prediction_changes(scheduler: Any) -> None:
    """The denoiser is the exact one for Gaussian pictures around a mean; those of a flow have hardly a spread."""
    torch.manual_seed(0)
    spread = spread_of(prediction_of(scheduler))
    assert spread == (0.01 if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else 0.5)
    start, mean = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)

    def predicted(number: int, x: Tensor, changed: int | None = None) -> Tensor:
        timestep = float(scheduler.timesteps[number])
        if hasattr(scheduler, "alphas_cumprod"):
            square = float(np.interp(timestep, np.arange(1000), scheduler.alphas_cumprod.double()))
            alpha, sigma = math.sqrt(square), math.sqrt(1 - square)
        else:
            alpha, sigma = 1 - timestep / 1000, timestep / 1000
        clean = mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mean)
        noise = (x - alpha * clean) / sigma
        kind = scheduler.config.get("prediction_type", "flow")
        answer = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "flow": noise - clean}[kind]
        return answer + (number == changed)

    plain = sampled(scheduler, predicted, start)
    scheduler.set_timesteps(CALLS)
    found = responses(scheduler)
    assert found is not None
    assert scheduler.step_index is None if hasattr(scheduler, "step_index") else True
    for changed in range(CALLS):
        change = sampled(scheduler, partial(predicted, changed=changed), start) - plain
        torch.testing.assert_close(change, torch.full_like(change, found.moves[changed]), rtol=2e-2, atol=1e-3)


def test_a_flow_that_predicts_its_clean_sample_is_repaid_what_it_does_not_heal() -> None:
    """What is left of an error later is the noise then by the noise after its call: the closed form."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(CALLS)
    found = responses(scheduler)
    assert found is not None
    sigmas = scheduler.sigmas.tolist()
    for early in range(CALLS - 4):  # while there is noise left
        late = early + 2
        step = sigmas[early + 1] - sigmas[early], sigmas[late + 1] - sigmas[late]
        left = sigmas[late + 1] / sigmas[early + 1]
        assert found.moves[early] / found.moves[late] == pytest.approx(left * step[0] / step[1], rel=0.02)


class Unknown(DDIMScheduler):
    """Somebody's own: what its step does to a prediction is nobody's to guess, and is not tried."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was stepped to find out")


class Unchanged(EulerDiscreteScheduler):
    """A class of one's own whose steps are the library's."""

    def index_for_timestep(self, *args: Any, **kwargs: Any) -> int:
        index: int = super().index_for_timestep(*args, **kwargs)
        return index


def test_a_subclass_that_steps_as_its_parent_is_known() -> None:
    found = []
    for scheduler in (EulerDiscreteScheduler(), Unchanged()):
        scheduler.set_timesteps(6)
        found.append(responses(scheduler))
    assert found[0] is not None
    assert found[0] == found[1]


def test_settings_of_another_class_count_for_nothing() -> None:
    """diffusers keeps what a class does not take in its configuration."""
    saved = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", thresholding=True).config
    scheduler = EulerDiscreteScheduler.from_config(saved)
    assert scheduler.config["algorithm_type"] == "sde-dpmsolver++"
    scheduler.set_timesteps(6)
    assert responses(scheduler) is not None


def test_what_watches_a_schedulers_steps_stays_behind() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    expected = responses(scheduler)

    def watched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the live scheduler was stepped")

    with shadowed([(scheduler, "step", watched)]):
        assert responses(scheduler) == expected
    assert scheduler.step_index is None


@pytest.mark.parametrize(
    "kind",
    [
        EulerAncestralDiscreteScheduler,
        KDPM2AncestralDiscreteScheduler,
        partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
        partial(FlowMatchEulerDiscreteScheduler, stochastic_sampling=True),
        partial(DDIMScheduler, thresholding=True),
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
        partial(EulerDiscreteScheduler, use_karras_sigmas=True),
        Unknown,
        object,
    ],
    ids=[
        "ancestral",
        "ancestral in its second call",
        "SDE",
        "stochastic",
        "thresholds",
        "calls twice at a timestep",
        "every other call moves it back",
        "unevenly",
        "steps in a way of its own",
        "is no scheduler",
    ],
)
def test_where_the_responses_are_not_known_nothing_is_corrected(kind: Callable[[], Any]) -> None:
    scheduler = kind()
    if hasattr(scheduler, "set_timesteps"):
        scheduler.set_timesteps(CALLS)
    answers = [torch.randn(1, 1, 2, 2) for _ in range(4)]
    assert responses(scheduler) is None
    assert all(map(operator.is_, corrected("CRCR", answers, None), answers))


@pytest.mark.parametrize(
    ("letters", "weights", "said"),
    [
        ("CRCC", None, [False] * 4),
        ("CRCC", [1.0] * 4, [False, False, True, True]),
        ("CCRR", [1.0] * 4, [False] * 4),
        ("CRCR", [1.0, -1.0, 1.0, -1.0], [False] * 4),
    ],
    ids=["not known", "repaid", "nothing computes afterwards", "weights of either sign"],
)
def test_the_report_says_whether_a_call_has_repaid(letters: str, weights: list[float] | None, said: list[bool]) -> None:
    run = Scripted(list(letters), lambda number: torch.ones(1, 1, 2, 2), weights)
    assert run.report.settings["correction"] is False
    found = []
    for number in range(4):
        run(number, torch.zeros(1))
        found.append(run.report.settings["correction"])
    assert found == said


@pytest.mark.parametrize(
    ("scheduler", "multistep"),
    [
        (EulerDiscreteScheduler(), False),
        (EulerDiscreteScheduler.from_config(DPMSolverMultistepScheduler().config), False),
        (FlowMatchEulerDiscreteScheduler(), False),
        (DDIMScheduler(), False),
        (DPMSolverMultistepScheduler(), True),
        (DPMSolverMultistepScheduler(solver_order=1), False),
        (UniPCMultistepScheduler(), True),
        (DEISMultistepScheduler(), True),
    ],
    ids=lambda one: str(one) if isinstance(one, bool) else type(one).__name__,
)
def test_what_extrapolates_is_told_by_its_order(scheduler: Any, multistep: bool) -> None:
    scheduler.set_timesteps(6)
    found = responses(scheduler)
    assert found is not None
    assert found.multistep is multistep


@pytest.mark.parametrize(("letters", "share"), [("CRC", 1.0), ("CRRC", 1.0), ("CRRRC", 2 / 3), ("CRRRRC", 2 / 3)])
def test_a_multistep_sampler_is_repaid_a_part_of_a_long_row(letters: str, share: float) -> None:
    """Two thirds of it, as an extrapolation takes a change 3/2 times at first."""
    answers = torch.randn(len(letters), 1, 1, 2, 2, dtype=torch.float64)
    whole, part = (
        corrected(letters, list(answers), Response([1.0] * len(letters), multistep))[-1] for multistep in (False, True)
    )
    assert not torch.equal(whole, answers[-1])
    torch.testing.assert_close(part - answers[-1], share * (whole - answers[-1]), rtol=1e-12, atol=1e-12)
    assert torch.equal(part, whole) is (share == 1)


def test_what_a_line_owes_less_for_is_not_held_against_a_parabola() -> None:
    """For each item: one was told what the line says and owes nothing, the other is repaid by the parabola."""
    torch.manual_seed(0)
    first, second, third = torch.randn(3, 2, 1, 2, 2, dtype=torch.float64)
    at = [(1 + call) ** 0.7 for call in range(4)]
    share = (at[2] - at[1]) / (at[3] - at[1])
    line = second + share * (third - second)
    curve = np.polynomial.Polynomial.fit  # through three points, another way than by Lagrange's
    known = torch.stack([first, second, third]).flatten(1).numpy()
    bent = torch.tensor([curve([at[0], at[1], at[3]], column, 2)(at[2]) for column in known.T]).view_as(line)
    told = line.clone()
    told[1] = 3 * bent[1] - 2 * line[1]  # beyond the parabola, on its side of the line
    (*_, found) = corrected("CCRC", [first, second, told, third], Response([1.0] * 4))
    torch.testing.assert_close(found[0], third[0])
    torch.testing.assert_close(found[1], third[1] + bent[1] - told[1])


@pytest.mark.parametrize("scheduler", LINEAR_STEPS, ids=lambda one: type(one).__name__)
def test_predictions_on_a_parabola_end_where_the_uncached_run_ends(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gap begins with two computed calls before it and ends with one. However much they weigh."""
    monkeypatch.setattr(solver, "LIGHTEST", math.inf)
    torch.manual_seed(0)
    start, *terms = torch.randn(4, 2, 3, 2, 2, dtype=torch.float64)

    def truth(number: int) -> Tensor:
        place = (1 + number) ** 0.7
        return terms[0] + place * terms[1] / 3 + place**2 * terms[2] / 20

    exact = sampled(scheduler, lambda number, _: truth(number), start)
    letters = [2 * letter for letter in "CCRRCRCRRCRC"]
    repeats = Scripted(letters, truth, moved(scheduler))
    found = sampled(scheduler, repeats, start)
    assert repeats.report.settings["correction"]
    assert repeats.report.decisions == "CCRRCRCRRCRC"
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    plain = Scripted(letters, truth, None)
    assert (sampled(scheduler, plain, start) - exact).abs().max() > 0.01


def test_items_that_decide_apart_are_corrected_as_if_they_were_alone() -> None:
    torch.manual_seed(0)
    scheduler = EulerDiscreteScheduler()
    start, *truths = torch.randn(CALLS + 1, 3, 2, 2, 2, dtype=torch.float64)
    letters = ["CCRCRRCRCRRC", "CRRCRCCRRCRC", "CCCRRRCRCRRR"]
    weights = moved(scheduler)
    together = Scripted(["".join(call) for call in zip(*letters, strict=True)], truths.__getitem__, weights)
    found = sampled(scheduler, together, start)
    for item, own in enumerate(letters):
        rows = slice(item, item + 1)
        alone = Scripted(list(own), lambda number, rows=rows: truths[number][rows], weights)
        torch.testing.assert_close(found[rows], sampled(scheduler, alone, start[rows]), rtol=1e-10, atol=1e-10)


def test_what_a_stopped_call_leaves_is_forgotten() -> None:
    """The run that follows in the same context starts from nothing, its numbers included."""
    truths = torch.randn(4, 1, 1, 2, 2)
    expected = corrected("CRCC", [truths[0], truths[0], truths[2], truths[3]], Response([1.0] * 4))
    stops = [1, 2, 3]  # each once

    def truth(number: int) -> Tensor:
        if number in stops:
            stops.remove(number)
            raise KeyboardInterrupt
        return truths[number]

    run = Scripted(["C", "R", "C", "C"], truth, [1.0] * 4)

    def answers() -> list[Tensor]:
        return [run(number, torch.zeros(1)) for number in range(4)]

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            answers()
    assert all(map(torch.equal, answers(), expected))


def test_the_weights_are_those_of_the_polynomial_through_the_nodes() -> None:
    for nodes in ([7], [7, 3], [7, 3, 2]):
        for power in range(len(nodes)):
            weights = lagrange(nodes, 5)
            assert sum(weight * node**power for weight, node in zip(weights, nodes, strict=True)) == pytest.approx(
                5**power
            )


@pytest.mark.parametrize("forecast", [False, True])
@torch.no_grad()
def test_it_belongs_to_the_forecast(forecast: bool) -> None:
    for network, denoise, kind in (
        (small_unet(), denoise_unet, DeepCache),
        (small_flux(), denoise_flux, partial(FirstBlockCache, threshold=1.0, max_consecutive=1)),
    ):
        known = view_of(network).sampled(lambda: Response([1.0] * 6))
        with attach(known, kind(forecast=forecast)) as report:
            list(denoise(network))
        assert report.settings["correction"] is forecast


@pytest.mark.parametrize(("letters", "repaid"), [("CCRRC", True), ("CCRRRRRRRRRC", False)])
def test_what_weighs_more_than_its_call_can_carry_is_not_repaid(letters: str, repaid: bool) -> None:
    """Each call weighs 1.3 times as much as the next: two reused ones 3 times the computed one, nine 42 times."""
    answers = [torch.randn(1, 1, 2, 2) for _ in letters]
    found = corrected(letters, answers, Response([1.3 ** (20 - call) for call in range(len(letters))]))
    assert all(map(operator.is_, found[:-1], answers[:-1]))
    assert torch.equal(found[-1], answers[-1]) is not repaid
