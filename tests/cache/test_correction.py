"""The correction of reused calls: held against plain sampling loops and against finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
)
from torch import Tensor, nn

from cache import CacheReport, Denoiser, correction
from cache.correction import Correction, lagrange, wanted
from cache.patching import Call, shadowed
from cache.sampling import SPREAD, responses

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


class Strategy:
    """Computes where `letters` say C, one letter for each item, and repeats its last answer where they say R.

    Nothing is corrected without a scheduler.
    """

    def __init__(self, letters: list[str], truth: Callable[[int], Tensor], scheduler: Any) -> None:
        self.letters, self.truth = letters, truth
        self.report = CacheReport("test")
        self.last = torch.tensor(torch.nan)
        view = Denoiser(nn.Identity()).sampled(lambda: None if scheduler is None else moved(scheduler))
        self.handle = Correction(view, self.report).around(self._handle)

    def _handle(self, call: Call) -> tuple[Tensor]:
        number = len(self.report.decisions)
        letters = self.letters[number]
        computes = torch.tensor([letter == "C" for letter in letters]).view(-1, 1, 1, 1)
        self.last = torch.where(computes, self.truth(number), self.last)
        self.report.record(letters)
        return (self.last.clone(),)

    def __call__(self, number: int, sample: Tensor) -> Tensor:
        return self.handle(Call(lambda: None, (sample,), {}, None))[0]


@pytest.mark.parametrize("scheduler", LINEAR_STEPS, ids=lambda one: type(one).__name__)
def test_a_response_is_what_a_changed_prediction_changes(scheduler: Any) -> None:
    """The denoiser is the exact one for Gaussian pictures of spread SPREAD around a mean."""
    torch.manual_seed(0)
    start, mean = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)

    def predicted(number: int, x: Tensor, changed: int | None = None) -> Tensor:
        timestep = float(scheduler.timesteps[number])
        if hasattr(scheduler, "alphas_cumprod"):
            square = float(np.interp(timestep, np.arange(1000), scheduler.alphas_cumprod.double()))
            alpha, sigma = math.sqrt(square), math.sqrt(1 - square)
        else:
            alpha, sigma = 1 - timestep / 1000, timestep / 1000
        clean = mean + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * mean)
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
        torch.testing.assert_close(change, torch.full_like(change, found[changed]), rtol=2e-2, atol=1e-3)


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
        "unevenly",
        "steps in a way of its own",
        "is no scheduler",
    ],
)
def test_where_the_responses_are_not_known_nothing_is_corrected(kind: Callable[[], Any]) -> None:
    scheduler = kind()
    if hasattr(scheduler, "set_timesteps"):
        scheduler.set_timesteps(CALLS)
    report = CacheReport("test")
    repaying = Correction(Denoiser(nn.Identity()).sampled(lambda: responses(scheduler)), report)

    def handle(call: Call) -> tuple[Tensor]:
        report.record("CRCR"[len(report.decisions)])
        return call.args

    handler = repaying.around(handle)
    answers = [torch.randn(1, 1, 2, 2) for _ in range(4)]
    assert all(handler(Call(lambda: None, (answer,), {}, None))[0] is answer for answer in answers)
    repaying.explain(asked=False)
    assert (report.settings, report.warnings) == ({"correction": False}, [])
    repaying.explain(asked=True)
    assert len(report.warnings) == 1


@pytest.mark.parametrize("scheduler", LINEAR_STEPS, ids=lambda one: type(one).__name__)
def test_predictions_on_a_parabola_end_where_the_uncached_run_ends(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gap begins with two computed calls before it and ends with one. However much they weigh."""
    monkeypatch.setattr(correction, "LIGHTEST", math.inf)
    torch.manual_seed(0)
    start, *terms = torch.randn(4, 2, 3, 2, 2, dtype=torch.float64)

    def truth(number: int) -> Tensor:
        place = (1 + number) ** 0.7
        return terms[0] + place * terms[1] / 3 + place**2 * terms[2] / 20

    exact = sampled(scheduler, lambda number, _: truth(number), start)
    repeats = Strategy([2 * letter for letter in "CCRRCRCRRCRC"], truth, scheduler)
    found = sampled(scheduler, repeats, start)
    assert repeats.report.settings["correction"]
    assert repeats.report.decisions == "CCRRCRCRRCRC"
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    plain = Strategy([2 * letter for letter in "CCRRCRCRRCRC"], truth, None)
    assert (sampled(scheduler, plain, start) - exact).abs().max() > 0.01


def test_items_that_decide_apart_are_corrected_as_if_they_were_alone() -> None:
    torch.manual_seed(0)
    scheduler = EulerDiscreteScheduler()
    start, *truths = torch.randn(CALLS + 1, 3, 2, 2, 2, dtype=torch.float64)
    letters = ["CCRCRRCRCRRC", "CRRCRCCRRCRC", "CCCRRRCRCRRR"]
    together = Strategy(["".join(call) for call in zip(*letters, strict=True)], truths.__getitem__, scheduler)
    found = sampled(scheduler, together, start)
    for item, own in enumerate(letters):
        rows = slice(item, item + 1)
        alone = Strategy(list(own), lambda number, rows=rows: truths[number][rows], scheduler)
        torch.testing.assert_close(found[rows], sampled(scheduler, alone, start[rows]), rtol=1e-10, atol=1e-10)


def test_what_a_stopped_call_leaves_is_forgotten() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    report = CacheReport("test")
    repaying = Correction(Denoiser(nn.Identity()).sampled(lambda: responses(scheduler)), report)

    def handle(call: Call) -> tuple[Tensor]:
        if len(report.decisions) == 2 and call.args[0].isnan().any():
            raise KeyboardInterrupt
        report.record("CRCC"[len(report.decisions)])
        return call.args

    handler = repaying.around(handle)
    answers = [torch.full((1, 1, 2, 2), float(value)) for value in (1, 2, 3)]
    handler(Call(lambda: None, (answers[0],), {}, None))
    handler(Call(lambda: None, (answers[1],), {}, None))
    with pytest.raises(KeyboardInterrupt):
        handler(Call(lambda: None, (answers[2] * torch.nan,), {}, None))
    assert torch.equal(handler(Call(lambda: None, (answers[2],), {}, None))[0], answers[2])


def test_the_weights_are_those_of_the_polynomial_through_the_nodes() -> None:
    for nodes in ([7], [7, 3], [7, 3, 2]):
        for power in range(len(nodes)):
            weights = lagrange(nodes, 5)
            assert sum(weight * node**power for weight, node in zip(weights, nodes, strict=True)) == pytest.approx(
                5**power
            )


def test_left_open_it_belongs_to_every_forecast_but_none() -> None:
    assert [wanted(None, name) for name in ("none", "linear", "damped", "probe")] == [False, True, True, True]
    assert [wanted(asked, name) for asked in (False, True) for name in ("none", "probe")] == [False, False, True, True]


@pytest.mark.parametrize(("letters", "repaid"), [("CCRRC", True), ("CCRRRRRRRRRC", False)])
def test_what_weighs_more_than_its_call_can_carry_is_not_repaid(letters: str, repaid: bool) -> None:
    """Each call weighs 1.3 times as much as the next: two reused ones 3 times the computed one, nine 42 times."""
    report = CacheReport("test")
    weights = [1.3 ** (20 - call) for call in range(len(letters))]
    repaying = Correction(Denoiser(nn.Identity()).sampled(lambda: weights), report)

    def handle(call: Call) -> tuple[Tensor]:
        report.record(letters[len(report.decisions)])
        return call.args

    handler = repaying.around(handle)
    answers = [torch.randn(1, 1, 2, 2) for _ in letters]
    found = [handler(Call(lambda: None, (answer,), {}, None))[0] for answer in answers]
    assert all(one is answer for one, answer in zip(found[:-1], answers[:-1], strict=True))
    assert torch.equal(found[-1], answers[-1]) is not repaid
