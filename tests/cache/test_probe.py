"""The first block tells how far along their lines the other blocks' residuals have moved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cache import FirstBlockCache, attach
from cache.forecast import Line
from tests.cache.networks import Plain, denoise_flux, tiny_flux

CALLS = 14


def moving(pace: Tensor, calls: int = CALLS) -> tuple[list[Tensor], Tensor]:
    """Inputs (items, 5, 8) that bend on their way, each item at its own pace, and their condition."""
    generator = torch.Generator().manual_seed(0)
    items = len(pace)
    start, motion, bend = torch.randn(3, items, 5, 8, generator=generator, dtype=torch.float64)
    condition = torch.randn(items, 8, generator=generator, dtype=torch.float64)
    pace = pace.double()[:, None, None]
    steps = [start + pace * (motion * math.sin(0.3 * n) + 0.3 * bend * math.cos(0.5 * n)) for n in range(calls)]
    return steps, condition


def by_the_book(
    network: Plain, inputs: list[Tensor], text: Tensor, threshold: float, cap: float
) -> tuple[str, list[Tensor], list[float | None]]:
    """One item alone, in float64 and with another solver for the step along the line."""
    letters, known, spent, streak = "", [], 0.0, 0
    outputs: list[Tensor] = []
    held: list[float | None] = []
    for call, hidden in enumerate(inputs):
        head = network.blocks[0](hidden, text)
        probe, reuse, change = head - hidden, False, None
        if known:
            (at, last, tail), ahead, slope = known[-1], 0.0, torch.zeros_like(head)
            tail_slope = torch.zeros_like(head)
            if len(known) > 1:
                before, last_before, tail_before = known[-2]
                slope, tail_slope = last - last_before, tail - tail_before
                solution = torch.linalg.lstsq(slope.reshape(-1, 1), (probe - last).reshape(-1, 1)).solution
                ahead = min(max(float(solution), 0.0), 2 * (call - at) / (at - before))
            beside = (probe - last - ahead * slope).abs().mean() / last.abs().mean()
            change = spent + float(beside)
            reuse = change < threshold and streak < cap
        held.append(change)
        if reuse and change is not None:
            streak, spent = streak + 1, change
            outputs.append(head + tail + ahead * tail_slope)
        else:
            streak, spent = 0, 0.0
            outputs.append(network.blocks[2](network.blocks[1](head, text), text))
            known.append((call, probe, outputs[-1] - head))
        letters += "R" if reuse else "C"
    return letters, outputs, held


@pytest.mark.parametrize(("threshold", "cap"), [(0.05, None), (0.2, None), (0.2, 2)])
@torch.no_grad()
def test_each_item_follows_its_own_first_block(threshold: float, cap: int | None) -> None:
    torch.manual_seed(0)
    network = Plain().double()
    inputs, condition = moving(torch.tensor([0.1, 0.4, 1.5]))
    with attach(network, FirstBlockCache(threshold, cap)) as report:
        outputs = [network(hidden, condition) for hidden in inputs]
    held = []
    for item in range(3):
        row = slice(item, item + 1)
        letters, expected, changes = by_the_book(
            network, [hidden[row] for hidden in inputs], condition[row], threshold, cap or math.inf
        )
        held.append(changes)
        assert report.item_decisions[item] == letters
        # The step along the line is summed in float32.
        torch.testing.assert_close(torch.cat([out[row] for out in outputs]), torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert len(set(report.item_decisions)) > 1
    largest = [None if None in call else max(call) for call in zip(*held, strict=True)]
    assert report.residuals[0] is None
    assert report.residuals[1:] == pytest.approx(largest[1:], rel=1e-4)


def test_the_step_along_a_line_is_met_and_never_goes_back() -> None:
    line = Line(4, witness=True)
    direction = torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0], [2.0, 2.0]])
    direction[3] = 0  # an item that stood still
    line.add(0, 0 * direction)
    line.add(2, 2 * direction)
    target = 2 * direction + torch.tensor([3.0, 0.5, -1.0, 1.0])[:, None] * direction
    target[1] += torch.tensor([7.0, 0.0])  # across its line, which is no way along it
    target[3] += 5
    moved, rest = line.ahead_of(target, 4)
    ahead = moved.tolist()
    zero = torch.zeros(4, 2)
    torch.testing.assert_close(rest, target - line.along(ahead, zero))
    assert ahead == pytest.approx([3.0, 0.5, 0.0, 0.0])
    assert line.ahead_of(target, 3)[0].tolist() == [2.0, 0.5, 0.0, 0.0]  # twice the one call that has passed
    torch.testing.assert_close(line.along(ahead, zero)[:3], (2 + torch.tensor(ahead)[:3, None]) * direction[:3])
    onto = torch.ones(4, 2)
    torch.testing.assert_close(line.along(ahead, onto), line.along(ahead, zero) + 1)
    assert onto.sum() == 8


@torch.no_grad()
def test_what_moves_on_a_line_is_reused_exactly_at_whatever_pace() -> None:
    """A linear network whose input speeds up and slows down along one line: its residuals are where the probe says."""
    torch.manual_seed(0)
    network = Plain().double()
    start, motion = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    condition = torch.randn(1, 8, dtype=torch.float64)
    inputs = [start + place * motion for place in (0, 1, 1.2, 3.5, 3.6, 7)]
    exact = [network(hidden, condition) for hidden in inputs]
    with attach(network, FirstBlockCache(0.05)) as report:
        outputs = [network(hidden, condition) for hidden in inputs]
    assert report.decisions == "CCRRRR"
    torch.testing.assert_close(torch.stack(outputs), torch.stack(exact), rtol=1e-5, atol=1e-5)
    with attach(network, FirstBlockCache(0.05, forecast=False)) as report:
        for hidden in inputs:
            network(hidden, condition)
    assert (
        report.decisions[3] == report.decisions[5] == "C"
    )  # the published rule sees that it moved, and not that it moved as foreseen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_residuals_in_half_precision_do_not_overflow(dtype: torch.dtype) -> None:
    line = Line(2, witness=True)
    step = torch.full((2, 4096), 512.0, dtype=dtype)
    for call in range(2):
        line.add(call, step * call)
    ahead = line.ahead_of(step * 3, 2)[0].tolist()
    assert ahead == [2.0, 2.0]
    assert torch.equal(line.along(ahead, torch.zeros_like(step)), step * 3)


@torch.no_grad()
def test_numbers_that_are_none_start_the_line_anew() -> None:
    torch.manual_seed(0)
    network = Plain()
    inputs, condition = moving(torch.tensor([0.1]), 7)
    states = [hidden.float() for hidden in inputs]
    states[3] = torch.full_like(states[3], torch.inf)
    with attach(network, FirstBlockCache(0.9)) as report:
        outputs = [network(hidden, condition.float()) for hidden in states]
    assert report.decisions == "CRRCCRR"
    assert [bool(output.isfinite().all()) for output in outputs] == [True] * 3 + [False] + [True] * 3
    assert any("not a number" in sentence for sentence in report.warnings)


@torch.no_grad()
def test_at_threshold_1_only_what_is_spent_computes_and_at_0_everything() -> None:
    network = tiny_flux()
    with attach(network, FirstBlockCache(1.0)) as report:
        list(denoise_flux(network, steps=10))
    assert report.decisions[:2] == "CR"
    last = 0.0
    for letter, change in zip(report.decisions[1:], report.residuals[1:], strict=True):
        assert change is not None
        assert (letter == "R") == (change < 1)
        assert change >= last or last >= 1  # a sum since the last computed call
        last = change
    with attach(network, FirstBlockCache(0)) as report:
        list(denoise_flux(network, steps=3))
    assert report.decisions == "CCC"
