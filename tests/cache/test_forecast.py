"""Forecasts: against float64 by another way; what is kept; how the caches use them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cache import DeepCache, FirstBlockCache, attach
from cache.forecast import Damped, Line
from cache.views.unet import BranchPass, UNetDenoiser
from tests.cache.networks import Plain, tiny_sd

EITHER = pytest.mark.parametrize("forecast", [False, True])


def foretold(forecast: bool, values: dict[int, Tensor], at: int) -> Tensor:
    """What `values` (by call) let DeepCache expect of call `at`, in float64, by none of its arithmetic."""
    return damped(values, at) if forecast else values[max(values)].double()


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


@EITHER
def test_any_values_give_what_they_let_expect(forecast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    history, values = Damped(forecast), {}
    for call in (0, 3, 4, 9):
        values[call] = torch.randn(2, 3, dtype=torch.float64, generator=generator)
        history.make_room()
        history.add(call, values[call])
        torch.testing.assert_close(history.at(call + 2), foretold(forecast, values, call + 2), rtol=1e-6, atol=1e-6)
        assert torch.equal(history.newest, values[call])


def test_plain_reuse_hands_out_the_kept_tensor_itself() -> None:
    history = Damped(forecast=False)
    for call in range(3):
        value = torch.randn(2)
        history.add(call, value)
        assert history.at(call + 5) is value
    first = Damped()
    first.add(0, value)
    assert first.at(1) is value


@EITHER
def test_no_more_is_kept_than_the_next_forecast_needs(forecast: bool) -> None:
    history, shares = Damped(forecast), 4 * 2  # of the slope, one an entry of the first dimension
    for call in range(5):
        history.make_room()  # the next slope is judged by the last one
        assert history.bytes == (32 * min(call, 2) + shares * (call > 1) if forecast else 0)
        history.add(call, torch.randn(2, 4))
        assert history.bytes == (32 * min(call + 1, 2) + shares * (call > 0) if forecast else 32)


@EITHER
def test_items_computed_at_calls_of_their_own_have_lines_of_their_own(forecast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    line, onto = Line(3, forecast), torch.ones(3, 2, 2, dtype=torch.float64)
    values: list[dict[int, Tensor]] = [{}, {}, {}]
    ahead = [0.5, 2.0, 3.0]
    for call, rows in {0: None, 1: [1], 2: [0, 1], 4: None, 5: [2], 7: [0]}.items():
        items = range(3) if rows is None else rows
        new = torch.randn(len(items), 2, 2, dtype=torch.float64, generator=generator)
        line.add(call, new.clone(), rows, None if rows is None else torch.tensor(rows))
        expected = []
        for item, value in zip(items, new, strict=True):
            values[item][call] = value
        for steps, known in zip(ahead, values, strict=True):
            (*before, last), moved = sorted(known), torch.zeros(2, 2, dtype=torch.float64)
            if before and forecast:
                moved = steps * (known[last] - known[before[-1]]) / (last - before[-1])
            expected.append(1 + known[last] + moved)
        torch.testing.assert_close(line.along(ahead, onto), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert onto.sum() == 12


def test_a_forgotten_item_starts_anew_and_leaves_the_others() -> None:
    line, zero = Line(2), torch.zeros(2, 1)
    points = [torch.tensor([[10.0 * call], [call]]) for call in range(6)]
    line.add(0, points[0].clone())
    line.add(1, torch.tensor([[torch.nan], [1.0]]))
    line.forget(0)
    line.add(2, points[2].clone())
    assert line.along([1, 1], zero).flatten().tolist() == [20.0, 3.0]  # item 0 has one value, item 1 a line
    line.add(3, points[3].clone())
    assert line.along([1, 1], zero).flatten().tolist() == [40.0, 4.0]


def test_where_all_is_forgotten_there_is_no_line_to_move_along() -> None:
    line, zero = Line(1, witness=True), torch.zeros(1, 2)
    for call in range(2):
        line.add(call, torch.full((1, 2), float(call)))
    line.forget(0)
    line.add(2, torch.ones(1, 2))
    ahead, rest = line.ahead_of(torch.full((1, 2), 5.0), 3)
    assert ahead.tolist() == [0.0]
    assert rest.tolist() == [[4.0, 4.0]]
    assert torch.equal(line.along([3], zero), torch.ones(1, 2))


def test_a_damped_line_is_met_exactly_once_its_slope_has_held() -> None:
    history = Damped()
    line = torch.tensor([[1.0, -2.0], [0.0, 8.0]], dtype=torch.float64)
    expected = [0, 0.5, 1, 1]  # of the way on from the last value
    for call, share in zip((0, 2, 3, 7), expected, strict=True):
        history.make_room()
        history.add(call, call * line)
        torch.testing.assert_close(history.at(call + 4), (call + 4 * share) * line, rtol=1e-6, atol=1e-6)


def test_a_damped_slope_that_turns_back_or_stood_still_is_halved() -> None:
    for values in ([0.0, 1.0, 0.0], [1.0, 1.0, 2.0]):
        history = Damped()
        for call, value in enumerate(values):
            history.add(call, torch.tensor([[value]]))
        assert history.at(3).item() == values[-1] + (values[-1] - values[-2]) / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_values_in_half_precision_are_damped_as_others(dtype: torch.dtype) -> None:
    """A sum of their squares is far beyond float16."""
    history = Damped()
    step = torch.full((2, 4096), 500.0, dtype=dtype)
    for call in range(3):
        history.add(call, step * call)
    assert torch.equal(history.at(3), step * 3)


@EITHER
@torch.no_grad()
def test_deepcache_runs_its_branch_on_the_forecast_state(forecast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert report.settings["forecast"] == ("damped" if forecast else "none")
    assert [call for call, _ in states] == [1, 2, 4, 5, 7, 8, 10]
    for call, state in states:
        known = {c: value for c, value in computed.items() if c < call}
        torch.testing.assert_close(state, foretold(forecast, known, call), rtol=1e-6, atol=1e-6)
    tensor = next(iter(computed.values()))
    shares = 8 * len(tensor) * forecast
    assert report.cache_bytes == (1 + forecast) * tensor.numel() * tensor.element_size() + shares


def noise_upon_noise(network: Any, *, steps: int) -> Any:
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        sample = torch.randn(2, 4, 16, 16, dtype=torch.float64, generator=generator)
        text = torch.randn(2, 7, 32, dtype=torch.float64, generator=generator)
        yield network(sample, 1000 - 50 * number, text).sample


@EITHER
@torch.no_grad()
def test_where_no_layer_runs_the_prediction_is_forecast(forecast: bool) -> None:
    network = tiny_sd().double()
    with attach(network, DeepCache(2, 12, forecast=forecast)) as report:
        outputs = list(noise_upon_noise(network, steps=8))
    assert report.settings["branch"] is None
    known: dict[int, Tensor] = {}
    for call, output in enumerate(outputs):
        if call % 2 == 0:
            known[call] = output
        torch.testing.assert_close(output, foretold(forecast, known, call), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_without_a_forecast_each_item_repeats_what_it_computed_last() -> None:
    """Three items that move at different paces, against a float64 loop over each item alone."""
    torch.manual_seed(0)
    network = Plain().double()
    start, motion, condition = torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.randn(3, 8)
    pace = torch.tensor([0.05, 0.2, 0.6])[:, None, None]
    inputs = [(start + pace * motion * math.sin(0.4 * call)).double() for call in range(12)]
    condition = condition.double()
    with attach(network, FirstBlockCache(0.1, 3, forecast=False)) as report:
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
            expected = head + known[max(known)]
            torch.testing.assert_close(outputs[call][item : item + 1], expected, rtol=1e-6, atol=1e-6)
            letters += "R" if reuse else "C"
        assert report.item_decisions[item] == letters


@EITHER
@torch.no_grad()
def test_numbers_that_are_none_are_never_forecast_from(forecast: bool) -> None:
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
    for forecast in (False, True):
        with attach(network, DeepCache(3, 0, forecast=forecast)):
            errors[forecast] = sum(float((a - b).norm()) for a, b in zip(outputs(), exact, strict=True))
    assert errors[True] < errors[False] / 1.5
