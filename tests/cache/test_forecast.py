"""Forecasts: exact on polynomials, against Lagrange's formula in float64; what is kept; how the caches use them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cache import DeepCache, FirstBlockCache, attach
from cache.forecast import ORDERS, Forecast, History
from cache.views.unet import BranchPass, UNetDenoiser
from tests.cache.networks import Plain, tiny_sd

POLYNOMIAL: list[Forecast] = ["none", "linear", "quadratic"]
EVERY: list[Forecast] = [*POLYNOMIAL, "damped"]


def foretold(forecast: Forecast, values: dict[int, Tensor], at: int) -> Tensor:
    """What `values` (by call) let expect of call `at`, in float64, by none of History's arithmetic."""
    return damped(values, at) if forecast == "damped" else lagrange(values, ORDERS[forecast], at)


def damped(values: dict[int, Tensor], at: int) -> Tensor:
    """Entry by entry of the first dimension; the slope's share is read off an angle and two lengths."""
    calls = sorted(values)[-3:]
    last = values[calls[-1]].double()
    if len(calls) == 1:
        return last
    slopes = [(values[b].double() - values[a].double()) / (b - a) for a, b in itertools.pairwise(calls)]
    rows = []
    for entry in range(len(last)):
        held = 0.0
        if len(slopes) == 2:
            before, now = (slope[entry].flatten() for slope in slopes)
            cosine = torch.nn.functional.cosine_similarity(before, now, dim=0, eps=0)
            held = min(max(float(cosine * now.norm() / before.norm()), 0.0), 1.0)
        rows.append(last[entry] + (at - calls[-1]) * slopes[-1][entry] * (1 + held) / 2)
    return torch.stack(rows)


def lagrange(values: dict[int, Tensor], order: int, at: int) -> Tensor:
    """The polynomial through the newest order + 1 of `values`."""
    calls = sorted(values)[-order - 1 :]
    total = torch.zeros_like(values[calls[0]], dtype=torch.float64)
    for i in calls:
        total += values[i].double() * math.prod((at - j) / (i - j) for j in calls if j != i)
    return total


def test_orders_are_those_of_their_names() -> None:
    assert ORDERS == {"none": 0, "linear": 1, "quadratic": 2, "damped": 1, "probe": 1}


@given(
    forecast=st.sampled_from(POLYNOMIAL),
    gaps=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    coefficients=st.lists(st.integers(-9, 9), min_size=3, max_size=3),
    ahead=st.integers(1, 9),
)
def test_a_polynomial_of_the_forecasts_degree_is_met_exactly(
    forecast: Forecast, gaps: list[int], coefficients: list[int], ahead: int
) -> None:
    degree = min(ORDERS[forecast], len(gaps) - 1)

    def signal(call: int) -> Tensor:
        value = sum(c * call**power for power, c in enumerate(coefficients[: degree + 1]))
        return torch.tensor([value, -2 * value], dtype=torch.float64)

    history, call = History(forecast), 0
    for gap in gaps:
        call += gap
        history.make_room()
        history.add(call, signal(call))
    torch.testing.assert_close(history.at(call + ahead), signal(call + ahead), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("forecast", EVERY)
def test_any_values_give_what_they_let_expect(forecast: Forecast) -> None:
    generator = torch.Generator().manual_seed(0)
    history, values = History(forecast), {}
    for call in (0, 3, 4, 9):
        values[call] = torch.randn(2, 3, dtype=torch.float64, generator=generator)
        history.add(call, values[call])
        expected = foretold(forecast, values, call + 2)
        torch.testing.assert_close(history.at(call + 2), expected, rtol=1e-6, atol=1e-6)
        onto = torch.ones(2, 3, dtype=torch.float64)
        torch.testing.assert_close(history.at(call + 2, onto), expected + 1, rtol=1e-6, atol=1e-6)
        assert onto.sum() == 6
        assert torch.equal(history.newest, values[call])


def test_plain_reuse_hands_out_the_kept_tensor_itself() -> None:
    history = History("none")
    for call in range(3):
        value = torch.randn(2)
        history.add(call, value)
        assert history.at(call + 5) is value
    first = History("quadratic")
    first.add(0, value)
    assert first.at(1) is value


@pytest.mark.parametrize("forecast", EVERY)
def test_as_many_tensors_are_kept_as_the_order_needs_and_none_more(forecast: Forecast) -> None:
    history, damps = History(forecast), forecast == "damped"
    for call in range(5):
        history.make_room()  # damped judges the next slope by the last one
        shares = 4 * 2 * damps  # of its slope, one an entry of the first dimension
        assert history.bytes == 4 * 8 * min(call, ORDERS[forecast] + damps) + shares * (call > 1)
        history.add(call, torch.randn(2, 4))
        assert history.bytes == 4 * 8 * min(call + 1, ORDERS[forecast] + 1) + shares * (call > 0)


@pytest.mark.parametrize("forecast", EVERY)
def test_items_computed_at_calls_of_their_own_are_forecast_apart(forecast: Forecast) -> None:
    generator = torch.Generator().manual_seed(0)
    history = History(forecast, items=3)
    values: list[dict[int, Tensor]] = [{}, {}, {}]
    for call, rows in {0: None, 1: [1], 2: [0, 1], 4: None, 5: [2], 7: [0]}.items():
        items = range(3) if rows is None else rows
        new = torch.randn(len(items), 2, 2, dtype=torch.float64, generator=generator)
        history.add(call, new.clone(), rows)
        for item, value in zip(items, new, strict=True):
            values[item][call] = value[None]
        expected = torch.cat([foretold(forecast, known, call + 3) for known in values])
        torch.testing.assert_close(history.at(call + 3), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("forecast", EVERY)
def test_a_forgotten_item_starts_anew_and_leaves_the_others(forecast: Forecast) -> None:
    history = History(forecast, items=2)
    line = [torch.tensor([[10.0 * call], [call]]) for call in range(6)]
    history.add(0, line[0].clone())
    history.add(1, torch.tensor([[torch.nan], [1.0]]))
    history.forget(0)
    history.add(2, line[2].clone())
    moves = 0 if forecast == "none" else 1
    assert history.at(3).flatten().tolist() == [20.0, 2.0 + moves]  # item 0 has one value, item 1 a line
    history.add(3, line[3].clone())
    moves_0 = 0.5 if forecast == "damped" else moves  # its slope is a first one
    assert history.at(4).flatten().tolist() == [30.0 + 10 * moves_0, 3.0 + moves]


def test_a_damped_line_is_met_exactly_once_its_slope_has_held() -> None:
    history = History("damped")
    line = torch.tensor([[1.0, -2.0], [0.0, 8.0]], dtype=torch.float64)
    expected = [0, 0.5, 1, 1]  # of the way on from the last value
    for call, share in zip((0, 2, 3, 7), expected, strict=True):
        history.make_room()
        history.add(call, call * line)
        torch.testing.assert_close(history.at(call + 4), (call + 4 * share) * line, rtol=1e-6, atol=1e-6)


def test_a_damped_slope_that_turns_back_or_stood_still_is_halved() -> None:
    for values in ([0.0, 1.0, 0.0], [1.0, 1.0, 2.0]):
        history = History("damped")
        for call, value in enumerate(values):
            history.add(call, torch.tensor([[value]]))
        assert history.at(3).item() == values[-1] + (values[-1] - values[-2]) / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_values_in_half_precision_are_damped_as_others(dtype: torch.dtype) -> None:
    """A sum of their squares is far beyond float16."""
    history = History("damped")
    step = torch.full((2, 4096), 500.0, dtype=dtype)
    for call in range(3):
        history.add(call, step * call)
    assert torch.equal(history.at(3), step * 3)


@pytest.mark.parametrize("forecast", EVERY)
@torch.no_grad()
def test_deepcache_runs_its_branch_on_the_forecast_state(forecast: Forecast, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_sd().double()
    view = UNetDenoiser(network)
    states: list[tuple[int, Tensor]] = []
    plain_run = BranchPass.run

    def run(self: BranchPass, call: Any, state: Tensor) -> Any:
        states.append((len(report.decisions), state.clone()))
        return plain_run(self, call, state)

    monkeypatch.setattr(BranchPass, "run", run)
    computed: dict[int, Tensor] = {}
    with attach(view, DeepCache(3, 0, forecast=forecast)) as report:
        branch = report.settings["branch"]
        handle = view.source(branch).register_forward_hook(
            lambda _m, _a, out: computed.__setitem__(
                len(report.decisions), (out[0] if isinstance(out, tuple) else out).clone()
            )
        )
        list(noise_upon_noise(network, steps=11))
        handle.remove()
    assert report.decisions == "CRRCRRCRRCR"
    assert report.settings["forecast"] == forecast
    assert [call for call, _ in states] == [1, 2, 4, 5, 7, 8, 10]
    for call, state in states:
        known = {c: value for c, value in computed.items() if c < call}
        torch.testing.assert_close(state, foretold(forecast, known, call), rtol=1e-6, atol=1e-6)
    tensor = next(iter(computed.values()))
    shares = 8 * len(tensor) * (forecast == "damped")
    assert report.cache_bytes == (ORDERS[forecast] + 1) * tensor.numel() * tensor.element_size() + shares


def noise_upon_noise(network: Any, *, steps: int) -> Any:
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        sample = torch.randn(2, 4, 16, 16, dtype=torch.float64, generator=generator)
        text = torch.randn(2, 7, 32, dtype=torch.float64, generator=generator)
        yield network(sample, 1000 - 50 * number, text).sample


@pytest.mark.parametrize("forecast", EVERY)
@torch.no_grad()
def test_where_no_layer_runs_the_prediction_is_forecast(forecast: Forecast) -> None:
    network = tiny_sd().double()
    with attach(network, DeepCache(2, 12, forecast=forecast)) as report:
        outputs = list(noise_upon_noise(network, steps=8))
    assert report.settings["branch"] is None
    known: dict[int, Tensor] = {}
    for call, output in enumerate(outputs):
        if call % 2 == 0:
            known[call] = output
        torch.testing.assert_close(output, foretold(forecast, known, call), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("forecast", EVERY)
@torch.no_grad()
def test_each_item_of_a_first_block_cache_is_forecast_from_its_own_calls(forecast: Forecast) -> None:
    """Three items that move at different paces, against a float64 loop over each item alone."""
    torch.manual_seed(0)
    network = Plain().double()
    start, motion, condition = torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.randn(3, 8)
    pace = torch.tensor([0.05, 0.2, 0.6])[:, None, None]
    inputs = [(start + pace * motion * math.sin(0.4 * call)).double() for call in range(12)]
    condition = condition.double()
    with attach(network, FirstBlockCache(0.1, 3, forecast)) as report:
        outputs = [network(hidden, condition) for hidden in inputs]
    assert len(set(report.item_decisions)) == 3
    for item in range(3):
        letters, known, probe, streak = "", {}, None, 0
        for call, hidden in enumerate(inputs):
            one, text = hidden[item : item + 1], condition[item : item + 1]
            head = network.blocks[0](one, text)
            reuse = probe is not None and (head - one - probe).abs().mean() / probe.abs().mean() < 0.1 and streak < 3
            streak = streak + 1 if reuse else 0
            if not reuse:
                probe = head - one
                known[call] = network.blocks[2](network.blocks[1](head, text), text) - head
            expected = head + foretold(forecast, known, call)
            torch.testing.assert_close(outputs[call][item : item + 1], expected, rtol=1e-6, atol=1e-6)
            letters += "R" if reuse else "C"
        assert report.item_decisions[item] == letters


@pytest.mark.parametrize("forecast", EVERY)
@torch.no_grad()
def test_numbers_that_are_none_are_never_forecast_from(forecast: Forecast) -> None:
    torch.manual_seed(0)
    network = Plain()
    hidden, condition = torch.randn(1, 5, 8), torch.randn(1, 8)
    broken = torch.full_like(hidden, torch.nan)
    with attach(network, FirstBlockCache(0.5, forecast=forecast)) as report:
        outputs = [network(state, condition) for state in (hidden, broken, hidden, hidden)]
    assert report.decisions == "CCCR"
    assert [bool(output.isfinite().all()) for output in outputs] == [True, False, True, True]


@torch.no_grad()
def test_a_forecast_is_nearer_than_plain_reuse_where_features_move_steadily() -> None:
    """A single UNet, inputs on a straight line: its features bend, but less than they move."""
    network = tiny_sd()
    generator = torch.Generator().manual_seed(0)
    start, motion = torch.randn(2, 1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 7, 32, generator=generator)

    def outputs() -> list[Tensor]:
        return [network(start + 0.05 * call * motion, 500, text).sample for call in range(9)]

    exact = outputs()
    errors = {}
    for forecast in EVERY:
        with attach(network, DeepCache(3, 0, forecast=forecast)):
            errors[forecast] = sum(float((a - b).norm()) for a, b in zip(outputs(), exact, strict=True))
    assert errors["linear"] < errors["none"] / 1.5
