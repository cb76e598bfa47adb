"""Reuse calls that run the conditional half alone, against a loop that runs whole networks and forecasts by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache import DeepCache, UNetDenoiser, attach
from tests.cache.networks import conditioning, denoise_unet, small_unet, tiny_sdxl, tiny_unconditional
from tests.cache.test_forecast import foretold

STEPS = 8
INTERVAL = 3


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def guided(network: nn.Module) -> UNetDenoiser:
    return UNetDenoiser(network, guided=lambda: True)


def double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: double(item) for name, item in value.items()}
    return value.double() if isinstance(value, Tensor) else value


def half(value: Any) -> Any:
    """The second of two rows."""
    return {name: half(item) for name, item in value.items()} if isinstance(value, dict) else value[1:]


def by_hand(network: nn.Module, source: nn.Module, forecast: bool, latents: Tensor, extra: Any) -> list[Tensor]:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    states: dict[int, Tensor] = {}
    differences: dict[int, Tensor] = {}
    results = []
    for call, timestep in enumerate(scheduler.timesteps):

        def watch(module: nn.Module, inputs: Any, output: Any, call: int = call) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            if call % INTERVAL == 0:
                states[call] = state[1:]
                return output
            told = foretold(forecast, states, call)
            return (told,) if isinstance(output, tuple) else told

        handle = source.register_forward_hook(watch)
        if call % INTERVAL == 0:
            without, with_text = network(torch.cat([latents] * 2), timestep, **extra).sample.chunk(2)
            differences[call] = with_text - without
        else:
            with_text = network(latents, timestep, **half(extra)).sample
            without = with_text - foretold(forecast, differences, call)
        handle.remove()
        latents = scheduler.step(without + 3 * (with_text - without), timestep, latents).prev_sample
        results.append(latents)
    return results


@pytest.mark.parametrize("forecast", [False, True])
@pytest.mark.parametrize("build", [small_unet, tiny_sdxl])
def test_the_unconditional_half_follows_from_the_difference(build: Any, forecast: bool) -> None:
    network = build().double()
    extra = double(conditioning(network, 2))
    latents = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    view, now, results, rows = guided(network), latents, [], []
    handle = network.conv_in.register_forward_hook(lambda _m, _a, out: rows.append(len(out)))
    strategy = DeepCache(INTERVAL, 0, forecast=forecast, schedule="uniform", guidance="reuse")
    with attach(view, strategy) as report:
        for timestep in scheduler.timesteps:
            without, with_text = network(torch.cat([now] * 2), timestep, **extra, return_dict=False)[0].chunk(2)
            now = scheduler.step(without + 3 * (with_text - without), timestep, now).prev_sample
            results.append(now)
    handle.remove()
    assert report.decisions == "CRRCRRCR"
    assert rows == [2, 1, 1, 2, 1, 1, 2, 1]
    assert report.settings["guidance"] == "reuse"
    expected = by_hand(network, view.source(report.settings["branch"]), forecast, latents, extra)
    torch.testing.assert_close(torch.cat(results), torch.cat(expected), rtol=1e-6, atol=1e-6)


def test_a_reuse_call_costs_half_and_says_so() -> None:
    network = small_unet()
    extra = conditioning(network, 2)
    extra["encoder_hidden_states"] = torch.randn(2, 77, 32)
    sample = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)
    operations = []
    # The counter does not know the CPU's fused attention, so that attention runs as the two products that it is.
    with sdpa_kernel(SDPBackend.MATH), attach(guided(network), DeepCache(2, 0, guidance="reuse")) as report:
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                network(sample, 500, **extra)
            operations.append(counter.get_total_flops())
    assert report.decisions == "CR"
    assert report.reuse_cost == pytest.approx(operations[1] / operations[0], rel=1e-9)


@pytest.mark.parametrize("case", ["not guided", "other rows", "odd", "without text", "no layer runs"])
def test_where_there_are_no_halves_nothing_changes_and_it_is_said(case: str) -> None:
    network = tiny_unconditional() if case == "without text" else small_unet()
    rows = 3 if case == "odd" else 2
    sample = torch.randn(rows, network.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    if case in ("not guided", "no layer runs"):
        sample = sample[:1].repeat(2, 1, 1, 1)
    view = UNetDenoiser(network) if case == "not guided" else guided(network)
    depth = 12 if case == "no layer runs" else 0
    results, reports = [], []
    for guidance in ("full", "reuse"):
        with attach(view, DeepCache(2, depth, schedule="uniform", guidance=guidance)) as report:  # type: ignore[arg-type]
            results.append([network(sample, t, **conditioning(network, rows)).sample for t in (800, 600, 400, 200)])
        reports.append(report)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert reports[1].settings["guidance"] == "full"
    assert reports[1].reuse_cost == reports[0].reuse_cost
    assert reports[0].warnings == []
    assert len(reports[1].warnings) == 1
    assert "both halves of guidance" in reports[1].warnings[0]


def test_a_pipeline_says_whether_it_guides() -> None:
    network = small_unet()
    pipe = SimpleNamespace(unet=network, do_classifier_free_guidance=True)
    for guides, expected in ((True, "reuse"), (False, "full")):
        pipe.do_classifier_free_guidance = guides
        with attach(pipe, DeepCache(2, 0, guidance="reuse")) as report:
            list(denoise_unet(network))
        assert report.settings["guidance"] == expected


def test_pictures_of_a_batch_stay_independent() -> None:
    """Three pictures together and each alone, in float64."""
    network = small_unet().double()
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(3, 4, 16, 16, dtype=torch.float64, generator=generator)
    text = torch.randn(6, 7, 32, dtype=torch.float64, generator=generator)

    def run(rows: list[int]) -> Tensor:
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS)
        now = latents[rows]
        states = text[[*rows, *(row + 3 for row in rows)]]
        with attach(guided(network), DeepCache(3, 0, guidance="reuse")):
            for timestep in scheduler.timesteps:
                without, with_text = network(torch.cat([now] * 2), timestep, states).sample.chunk(2)
                now = scheduler.step(without + 3 * (with_text - without), timestep, now).prev_sample
        return now

    torch.testing.assert_close(run([0, 1, 2]), torch.cat([run([i]) for i in range(3)]), rtol=1e-9, atol=1e-9)
