"""Forecasts: exact on polynomials, against Lagrange's formula in float64; what is kept; how the caches use them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cache import DeepCache, FirstBlockCache, attach
from cache.denoiser import BranchPass, UNetDenoiser
from cache.forecast import ORDERS, Forecast, History
from tests.cache.networks import Plain, tiny_sd

EVERY: list[Forecast] = ["none", "linear", "quadratic"]


def lagrange(values: dict[int, Tensor], order: int, at: int) -> Tensor:
    """The polynomial through the newest order + 1 of `values` (by call), in float64; none of History's arithmetic."""
    calls = sorted(values)[-order - 1 :]
    total = torch.zeros_like(values[calls[0]], dtype=torch.float64)
    for i in calls:
        total += values[i].double() * math.prod((at - j) / (i - j) for j in calls if j != i)
    return total


def test_orders_are_those_of_their_names() -> None:
    assert ORDERS == {"none": 0, "linear": 1, "quadratic": 2}


@given(
    forecast=st.sampled_from(EVERY),
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
def test_any_values_give_the_polynomial_through_the_newest(forecast: Forecast) -> None:
    generator = torch.Generator().manual_seed(0)
    history, values = History(forecast), {}
    for call in (0, 3, 4, 9):
        values[call] = torch.randn(2, 3, dtype=torch.float64, generator=generator)
        history.add(call, values[call])
        expected = lagrange(values, ORDERS[forecast], call + 2)
        torch.testing.assert_close(history.at(call + 2), expected, rtol=1e-12, atol=1e-12)
        onto = torch.ones(2, 3, dtype=torch.float64)
        torch.testing.assert_close(history.at(call + 2, onto), expected + 1, rtol=1e-12, atol=1e-12)
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
    history = History(forecast)
    for call in range(5):
        history.make_room()
        assert history.bytes == 4 * 8 * min(call, ORDERS[forecast])
        history.add(call, torch.randn(8))
        assert history.bytes == 4 * 8 * min(call + 1, ORDERS[forecast] + 1)


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
            values[item][call] = value
        expected = torch.stack([lagrange(known, ORDERS[forecast], call + 3) for known in values])
        torch.testing.assert_close(history.at(call + 3), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("forecast", EVERY)
def test_a_forgotten_item_starts_anew_and_leaves_the_others(forecast: Forecast) -> None:
    history = History(forecast, items=2)
    line = [torch.tensor([[10.0 * call], [call]]) for call in range(6)]
    history.add(0, line[0].clone())
    history.add(1, torch.tensor([[torch.nan], [1.0]]))
    history.forget(0)
    history.add(2, line[2].clone())
    held = [20.0, 2.0] if forecast == "none" else [20.0, 3.0]  # item 0 has one value, item 1 a line
    assert history.at(3).flatten().tolist() == held
    history.add(3, line[3].clone())
    assert history.at(4).flatten().tolist() == ([30.0, 3.0] if forecast == "none" else [40.0, 4.0])


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
        torch.testing.assert_close(state, lagrange(known, ORDERS[forecast], call), rtol=1e-9, atol=1e-9)
    tensor = next(iter(computed.values()))
    assert report.cache_bytes == (ORDERS[forecast] + 1) * tensor.numel() * tensor.element_size()


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
        torch.testing.assert_close(output, lagrange(known, ORDERS[forecast], call), rtol=1e-9, atol=1e-9)


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
            expected = head + lagrange(known, ORDERS[forecast], call)
            torch.testing.assert_close(outputs[call][item : item + 1], expected, rtol=1e-9, atol=1e-9)
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
