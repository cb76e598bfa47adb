"""A threshold for a wished speed-up: the recorded rule against runs of the cache itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cache import FirstBlockCache, IncompatibleDenoiser, attach, view_of
from cache.tuning.recorder import ResidualRecorder
from cache.tuning.threshold import Unreachable, decisions, expected, threshold_for
from cache.views.base import Response
from tests.cache.networks import denoise_flux, denoise_unet, flux_inputs, tiny_flux, tiny_sd


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def drifting(items: int = 2, calls: int = 9) -> list[Tensor]:
    """Latents that no prediction moves, so that a cached run sees what an uncached one does."""
    generator = torch.Generator().manual_seed(0)
    start, motion = torch.randn(2, items, 64, 16, generator=generator)
    pace = torch.linspace(0.02, 0.3, items)[:, None, None]
    return [start + pace * call**1.3 * motion for call in range(calls)]


def run(network: nn.Module, inputs: list[Tensor], name: str = "cond") -> list[Tensor]:
    outputs = []
    for call, hidden in enumerate(inputs):
        times = torch.full((len(hidden),), 1 - call / 10)
        with network.cache_context(name):
            outputs.append(network(hidden, timestep=times, **flux_inputs(network, len(hidden), (16, 16))).sample)
    return outputs


def recorded(network: nn.Module, inputs: list[Tensor]) -> ResidualRecorder:
    recorder = ResidualRecorder()
    with attach(network, recorder):
        run(network, inputs)
    return recorder


@pytest.mark.parametrize("forecast", [False, True])
def test_the_rule_on_recorded_residuals_decides_as_a_run_does(forecast: bool) -> None:
    network, inputs = tiny_flux(), drifting()
    recorder = recorded(network, inputs)
    seen = set()
    for threshold, cap in ((0.1, None), (0.4, None), (1.0, 2), (0.0, None)):
        settings = FirstBlockCache(threshold, cap, forecast)
        with attach(network, settings) as report:
            run(network, inputs)
        assert decisions(recorder.lanes[0], settings) == report.item_decisions
        seen |= set(report.item_decisions)
        found = expected(recorder, settings)
        letters = "".join(report.item_decisions)
        assert found.hit_rate == letters.count("R") / len(letters)
        if report.reused:
            assert recorder.reuse_cost == report.reuse_cost
    assert len(seen) > 3


@pytest.mark.parametrize(("forecast", "known"), [(True, True), (True, False), (False, True)])
def test_the_last_call_computes_where_it_is_known(forecast: bool, known: bool) -> None:
    """Nothing mends what it answers. The published cache takes what comes."""
    network, inputs = tiny_flux(), drifting(calls=4)
    response = Response([1.0] * len(inputs)) if known else None
    view = view_of(network).sampled(lambda: response)
    recorder, settings = ResidualRecorder(), FirstBlockCache(1.0, forecast=forecast)
    with attach(view, recorder):
        run(network, inputs)
    with attach(view, settings) as report:
        run(network, inputs)
    last = {letters[-1] for letters in report.item_decisions}
    assert ("R" not in last) is (forecast and known)
    assert recorder.ends is known
    assert decisions(recorder.lanes[0], settings, ends=recorder.ends) == report.item_decisions
    letters = "".join(report.item_decisions)
    assert expected(recorder, settings).hit_rate == letters.count("R") / len(letters)


def test_recording_changes_nothing_and_leaves_nothing_behind() -> None:
    network, inputs = tiny_flux(), drifting()
    block = network.transformer_blocks[0]
    expected_outputs = run(network, inputs)
    recorder = ResidualRecorder()
    with attach(network, recorder) as report:
        outputs = run(network, inputs)
        run(network, inputs[:3], "uncond")
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected_outputs, strict=True))
    assert report.decisions == "C" * 12
    assert [len(residuals) for residuals in recorder.lanes] == [9, 3]
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


def test_the_lowest_threshold_that_reaches_the_wish_is_found() -> None:
    recorder = recorded(tiny_flux(), drifting())
    for wish in (1.2, 1.6, 2.0):
        found = threshold_for(recorder, wish)
        assert found == expected(recorder, FirstBlockCache(found.threshold))
        assert found.speedup >= wish
        assert expected(recorder, FirstBlockCache(found.threshold - 2e-4)).speedup < wish
    assert threshold_for(recorder, 1.6, FirstBlockCache(max_consecutive=1)).threshold >= (
        threshold_for(recorder, 1.6).threshold
    )


def test_what_cannot_be_had_is_said() -> None:
    recorder = recorded(tiny_flux(), drifting())
    with pytest.raises(Unreachable, match="even threshold 1 gives"):
        threshold_for(recorder, 9)
    with pytest.raises(ValueError, match="above 1"):
        threshold_for(recorder, 1)
    with pytest.raises(ValueError, match="nothing was recorded"):
        threshold_for(ResidualRecorder(), 2)
    network = tiny_sd()
    with pytest.raises(IncompatibleDenoiser, match="interval and depth"), attach(network, ResidualRecorder()):
        list(denoise_unet(network, steps=1))


def test_a_block_that_writes_into_its_input_is_recorded_as_others() -> None:
    plain = recorded(tiny_flux(), drifting())
    network = tiny_flux()
    block = network.transformer_blocks[0]
    forward = block.forward

    def in_place(hidden_states: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        text, image = forward(hidden_states=hidden_states, **rest)
        return text, hidden_states.copy_(image)

    block.forward = in_place  # type: ignore[method-assign]
    written = recorded(network, drifting())
    assert all(torch.equal(a, b) for a, b in zip(plain.lanes[0], written.lanes[0], strict=True))


def test_the_promise_is_near_for_a_run_whose_latents_follow_the_cache() -> None:
    """A random network's residuals bend more than a trained one's; still the calls agree to a few."""
    network = tiny_flux()
    recorder = ResidualRecorder()
    with attach(network, recorder):
        list(denoise_flux(network, steps=16))
    found = threshold_for(recorder, 1.5)
    with attach(network, FirstBlockCache(found.threshold)) as report:
        list(denoise_flux(network, steps=16, seed=9))
    assert report.predicted_speedup == pytest.approx(found.speedup, rel=0.25)
