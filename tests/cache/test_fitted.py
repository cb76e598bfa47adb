"""A fitted forecast, held against weighted sums written out, and its weights against dense least squares."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from cache import FittedForecast, NoCache, attach
from cache.solver import steps_of
from cache.tuning import fitting
from cache.tuning.fitting import Fit, Response, fitted, products, searched, unmixed
from cache.tuning.recorder import PredictionRecorder
from tests.cache.families import z_image
from tests.cache.networks import small_unet
from tests.cache.test_solver import CALLS, LINEAR_STEPS, sampled

pytestmark = [  # diffusers' schedulers on NumPy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept"),
]

COMPUTED = (0, 2, 3)
WEIGHTS = ((1.0,), (1.25,), (-0.25, 1.5), (0.5, -1.0, 1.5), (0.25, 0.5))
ALL_COMPUTED = FittedForecast((0, 1, 2), ((1.0,), (1.0,), (1.0,)))


def answers(network: nn.Module, inputs: Sequence[dict[str, Any]], strategy: Any) -> tuple[list[Tensor], Any]:
    with torch.no_grad(), attach(network, strategy) as report:
        return [network(**one).sample for one in inputs], report


def calls(count: int, batch: int = 1, size: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "sample": torch.randn(batch, 4, size, size, generator=generator),
            "timestep": torch.tensor(900 - 100 * number),
            "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
        }
        for number in range(count)
    ]


def test_every_call_answers_the_weighted_sum_of_what_was_computed() -> None:
    network, inputs = small_unet(), calls(5, batch=2)
    plain, _ = answers(network, inputs, NoCache())
    found, report = answers(network, inputs, FittedForecast(COMPUTED, WEIGHTS))
    known = [plain[call] for call in COMPUTED]
    for call, row in enumerate(WEIGHTS):
        newest = [prediction for one, prediction in zip(COMPUTED, known, strict=True) if one <= call][-len(row) :]
        expected = sum(weight * prediction.double() for weight, prediction in zip(row, newest, strict=True))
        torch.testing.assert_close(found[call].double(), expected, rtol=1e-5, atol=1e-5)
    assert report.decisions == "CRCCR"
    assert report.predicted_speedup == pytest.approx(5 / 3)
    assert report.warnings == []
    assert report.cache_bytes == 3 * plain[0].nbytes
    assert report.as_dict()["strategy"] == "fitted"


def test_where_every_call_computes_nothing_changes_and_nothing_is_left() -> None:
    network, inputs = small_unet(), calls(3)
    plain, _ = answers(network, inputs, NoCache())
    for _ in range(2):
        found, report = answers(network, inputs, ALL_COMPUTED)
        assert all(map(torch.equal, found, plain))
        assert report.reused == 0
    assert "forward" not in vars(network)


def test_what_a_caller_does_to_an_answer_does_no_harm() -> None:
    network, inputs = small_unet(), calls(5)
    expected, _ = answers(network, inputs, FittedForecast(COMPUTED, WEIGHTS))
    with torch.no_grad(), attach(network, FittedForecast(COMPUTED, WEIGHTS)):
        for one, other in zip(inputs, expected, strict=True):
            answer = network(**one).sample
            assert torch.equal(answer, other)
            answer.zero_()


def test_half_precision_is_summed_in_float() -> None:
    """1 and a thousandth: in half precision a sum of four would lose them one by one."""
    values = [torch.full((1, 1), value, dtype=torch.float16) for value in (2048.0, 1.0, 1.0, -2048.0)]
    from cache.fitted.run import weighted

    total = weighted(values, (1.0, 1.0, 1.0, 1.0))
    assert total.dtype == torch.float16
    assert float(total) == 2.0


def test_calls_of_another_number_or_size_are_computed_and_told() -> None:
    network, inputs = small_unet(), calls(7)
    plain, _ = answers(network, inputs, NoCache())
    found, report = answers(network, inputs, FittedForecast(COMPUTED, WEIGHTS))
    assert report.decisions == "CRCCRCC"
    assert all(map(torch.equal, found[5:], plain[5:]))
    assert ["2 calls" in warning for warning in report.warnings] == [True]

    larger = [*inputs[:2], *calls(3, size=24)]
    plain, _ = answers(network, larger, NoCache())
    found, report = answers(network, larger, FittedForecast(COMPUTED, WEIGHTS))
    assert report.decisions == "CRCCC"
    assert all(map(torch.equal, found[2:], plain[2:]))


def test_lanes_are_apart() -> None:
    network, inputs = small_unet(), calls(10)
    alone = [answers(network, inputs[lane::2], FittedForecast(COMPUTED, WEIGHTS))[0] for lane in (0, 1)]
    with torch.no_grad(), attach(network, FittedForecast(COMPUTED, WEIGHTS)) as report:
        for number, one in enumerate(inputs):
            with network.cache_context("uncond" if number % 2 else "cond"):
                assert torch.equal(network(**one).sample, alone[number % 2][number // 2])
    assert report.decisions == "CCRRCCCCRR"


def test_a_list_of_items_comes_back_as_a_list() -> None:
    network, generator = z_image.build(), torch.Generator().manual_seed(0)
    inputs = [
        ([torch.randn(4, 1, 8, 8, generator=generator)], torch.tensor([0.1]), z_image.texts([5])) for _ in range(5)
    ]

    def drawn() -> list[Any]:
        return [network(*one, return_dict=False)[0] for one in inputs]

    with torch.no_grad():
        plain = drawn()
        with attach(network, FittedForecast(COMPUTED, WEIGHTS)):
            found = drawn()
    assert isinstance(found[1], list)
    torch.testing.assert_close(found[1][0], 1.25 * plain[0][0])


@pytest.mark.parametrize(
    ("computed", "weights", "words"),
    [
        ((), ((1.0,),), "rise from 0"),
        ((1,), ((1.0,), (1.0,)), "rise from 0"),
        ((0, 2, 1), WEIGHTS, "rise from 0"),
        ((0, 5), WEIGHTS, "call 5"),
        ((0, 2), ((1.0,), (1.0, 1.0), (1.0,)), "call 1 must have 1 to 1"),
        ((0,), ((),), "call 0 must have 1 to 1"),
    ],
)
def test_settings_that_fit_no_run_are_refused(computed: Any, weights: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FittedForecast(computed, weights)


@pytest.mark.parametrize("scheduler", [*LINEAR_STEPS, UniPCMultistepScheduler()], ids=lambda one: type(one).__name__)
def test_a_latent_holds_so_much_of_each_prediction(scheduler: Any) -> None:
    scheduler = copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(1)
    start, *predictions = torch.randn(CALLS + 1, 1, 4, 4, 4, generator=generator, dtype=torch.float64)
    plain, pushed = (
        sampled(copy.deepcopy(scheduler), lambda number, x, size=size: size * predictions[number], start)
        for size in (0.0, 1.0)
    )
    scheduler.set_timesteps(CALLS)
    moves = steps_of(scheduler)
    assert moves is not None
    assert moves.triu(1).abs().max() == 0
    moved = torch.einsum("i,i...->...", moves[-1], torch.stack(predictions))
    torch.testing.assert_close(pushed - plain, moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (HeunDiscreteScheduler, {}),
        (EulerAncestralDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_of_other_samplers_nothing_is_known(kind: Any, settings: dict[str, str]) -> None:
    scheduler = kind(**settings)
    scheduler.set_timesteps(CALLS)
    assert steps_of(scheduler) is None


def moves_of(scheduler: Any) -> Tensor:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(CALLS)
    moves = steps_of(scheduler)
    assert moves is not None
    return moves


def wandering(calls: int = CALLS, size: int = 300) -> Tensor:
    """Predictions that move smoothly."""
    generator = torch.Generator().manual_seed(2)
    steps = torch.randn(calls, size, generator=generator, dtype=torch.float64)
    return 5 * torch.randn(size, generator=generator, dtype=torch.float64) + steps.cumsum(0).cumsum(0) / 10


@pytest.mark.parametrize("scheduler", LINEAR_STEPS, ids=lambda one: type(one).__name__)
def test_the_weights_are_those_of_dense_least_squares(scheduler: Any) -> None:
    """The sampler steps, and at each call the answer is looked for that makes the next latent the uncached one."""
    predictions, moves, computed = wandering(), moves_of(scheduler), (0, 1, 4, 8)
    found = fitted(products(predictions), moves, computed)
    told: list[Tensor] = []
    for call in range(CALLS):
        known = torch.stack([predictions[one] for one in computed if one <= call], 1)
        wanted = predictions[call].clone()
        for before in range(call):
            wanted -= moves[call, before] / moves[call, call] * (told[before] - predictions[before])
        weights = torch.linalg.lstsq(known, wanted.unsqueeze(1)).solution.flatten()
        torch.testing.assert_close(torch.tensor(found.weights[call]).double(), weights, rtol=1e-3, atol=1e-3)
        told.append(known @ weights)
    left = moves[-1] @ (torch.stack(told) - predictions)
    assert found.error == pytest.approx(float(left @ left), rel=1e-3, abs=1e-3)


def test_predictions_on_a_line_are_forecast_without_error() -> None:
    moves, places = moves_of(LINEAR_STEPS[0]), torch.arange(CALLS, dtype=torch.float64).unsqueeze(1)
    predictions = torch.randn(2, 1, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    line = predictions[0] + places * predictions[1]
    scale = float(line.square().sum())
    assert fitted(products(line), moves, (0, 1)).error < 1e-6 * scale
    assert fitted(products(line), moves, tuple(range(CALLS))).error < 1e-9 * scale


def test_a_search_finds_no_worse_than_where_it_begins_and_keeps_the_number() -> None:
    moves, of = moves_of(LINEAR_STEPS[1]), products(wandering())
    for count in (3, 5, 8):
        found = searched(of, moves, count)
        assert len(found.computed) == count
        assert found.computed[0] == 0
        begun = [fitted(of, moves, fitting.warped(CALLS, count, growth)).error for growth in fitting.GROWTHS]
        assert found.error <= min(begun)
        assert found.error < max(begun)


ALONG, ACROSS = 0.4, 0.3


def drawn_with(fit: Fit, predictions: Tensor, moves: Tensor) -> tuple[Tensor, float]:
    """The own predictions of a network that feels an error of the latent along and across it, and the last |e|².

    Across: each computed call has numbers of its own behind the others, in which nothing else lies.
    """
    places = len(fit.computed)
    truth = torch.cat([predictions, predictions.new_zeros(CALLS, places)], 1)
    own, told = list[Tensor](), list[Tensor]()
    error = torch.zeros_like(truth[0])
    for call, row in enumerate(fit.weights):
        if call in fit.computed:
            answer = truth[call] + ALONG * error
            answer[predictions.shape[1] + len(own)] += ACROSS * error.norm()
            own.append(answer)
        told.append(sum((weight * one for weight, one in zip(row, own[-len(row) :], strict=True)), torch.tensor(0.0)))
        error = moves[call, : call + 1] @ (torch.stack(told) - truth[: call + 1])
    return torch.stack(own), float(error @ error)


@pytest.mark.parametrize("scheduler", LINEAR_STEPS, ids=lambda one: type(one).__name__)
def test_what_a_network_makes_of_an_error_is_measured_and_foreseen(scheduler: Any) -> None:
    predictions, moves = wandering(), moves_of(scheduler)
    alone = products(predictions)
    of_all = Response((ALONG,) * CALLS, (ACROSS,) * CALLS)
    fit = fitted(alone, moves, (0, 2, 5, 7), of_all)
    own, error = drawn_with(fit, predictions, moves)
    assert fit.error == pytest.approx(error, rel=1e-6)
    whole = products(torch.cat([predictions, predictions.new_zeros(CALLS, len(own))], 1), own)
    found = Response.measured([(whole, fit)], moves)
    assert found.along == pytest.approx(of_all.along)
    assert found.across == pytest.approx(of_all.across)
    unaware = fitted(alone, moves, (0, 2, 5, 7))
    assert drawn_with(unaware, predictions, moves)[1] > max(error, unaware.error)


def test_a_run_that_was_not_off_shows_nothing() -> None:
    predictions, moves = wandering(), moves_of(LINEAR_STEPS[0])
    fit = fitted(products(predictions), moves, range(CALLS))
    assert Response.measured([(products(predictions, predictions), fit)], moves) == Response.none(CALLS)


def test_a_search_believes_less_in_a_network_that_goes_astray() -> None:
    response = Response((0.3,) * CALLS, (0.4,) * CALLS)
    assert response.astray.along == (0.0,) * CALLS
    assert response.astray.across == pytest.approx((0.5,) * CALLS)
    moves, of = moves_of(LINEAR_STEPS[1]), products(wandering())
    assert searched(of, moves, 4, response.astray).error > searched(of, moves, 4).error


def test_sums_of_several_pictures_are_fitted_together() -> None:
    moves, one, other = moves_of(LINEAR_STEPS[0]), wandering(), wandering().flip(1) * 2
    joint = fitted(products(one) + products(other), moves, (0, 3, 6))
    together = fitted(products(torch.cat([one, other], 1)), moves, (0, 3, 6))
    assert [*chain(*joint.weights)] == pytest.approx([*chain(*together.weights)])


def test_the_networks_own_predictions_come_back_from_what_was_answered() -> None:
    fit = Fit(COMPUTED, WEIGHTS, 0.0)
    own = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    told = []
    for call, row in enumerate(WEIGHTS):
        newest = own[: sum(one <= call for one in COMPUTED)][-len(row) :]
        told.append(sum(weight * value for weight, value in zip(row, newest, strict=True)))
    torch.testing.assert_close(unmixed(torch.stack(told), fit), own)  # type: ignore[arg-type]


def test_a_recorder_hears_what_the_sampler_is_told() -> None:
    network, inputs = small_unet(), calls(5)
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    recorder = PredictionRecorder(FittedForecast(COMPUTED, WEIGHTS), lambda: scheduler)
    expected, _ = answers(network, inputs, FittedForecast(COMPUTED, WEIGHTS))
    with torch.no_grad(), attach(network, recorder) as report:
        sample = inputs[0]["sample"]
        for timestep, one in zip(scheduler.timesteps, inputs, strict=True):
            scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(network(**one).sample, timestep, sample).prev_sample
    assert report.decisions == "CRCCR"
    torch.testing.assert_close(recorder.runs[0], torch.stack(expected))
    assert recorder.moves is not None
    assert recorder.moves.shape == (5, 5)
    assert "step" not in vars(scheduler)
