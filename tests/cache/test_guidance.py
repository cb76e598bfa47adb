"""Guidance batched or split, and batches of unlike items: every item as if it had been alone.

In float64, where another batch size rounds in the sixteenth digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from cache import CacheReport, CacheStrategy, DeepCache, FirstBlockCache, attach
from cache.run import Lane, Run
from cache.views.base import Call, Denoiser
from tests.cache.networks import conditioning, flux_inputs, small_flux, small_unet

STEPS = 7
TEXT = ("encoder_hidden_states", "pooled_projections")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def start(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def denoise(network: nn.Module, latents: Tensor, text: Tensor, *, split: bool) -> Tensor:
    """DDIM with guidance. text: the unconditional rows, then the conditional ones."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    without_text, with_text = text.chunk(2)
    for timestep in scheduler.timesteps:
        if split:
            with network.cache_context("uncond"):
                without = network(latents, timestep, without_text).sample
            with network.cache_context("cond"):
                conditional = network(latents, timestep, with_text).sample
        else:
            without, conditional = network(torch.cat([latents] * 2), timestep, text).sample.chunk(2)
        noise = without + 3 * (conditional - without)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("forecast", [False, True])
@pytest.mark.parametrize("depth", [0, 12])
def test_deepcache_gives_the_same_for_guidance_batched_and_split(forecast: bool, depth: int) -> None:
    network = small_unet().double()
    text = conditioning(network, 2)["encoder_hidden_states"].double()
    results, letters = [], []
    for split in (False, True):
        with attach(network, DeepCache(2, depth, forecast=forecast)) as report:
            results.append(denoise(network, start(0, 1, 4, 16, 16), text, split=split))
        letters.append(report.decisions)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    assert letters == ["CRCRCRC", "CCRRCCRRCCRRCC"]


@pytest.mark.parametrize("forecast", [False, True])
def test_deepcaches_pictures_do_not_depend_on_their_batch(forecast: bool) -> None:
    network = small_unet().double()
    text = start(1, 6, 7, 32)  # three prompts, their unconditional rows first
    latents = torch.cat([start(2, 1, 4, 16, 16), start(3, 1, 4, 16, 16, scale=0.2), start(4, 1, 4, 16, 16, scale=3.0)])
    strategy = DeepCache(3, 0, forecast=forecast)

    def run(rows: list[int]) -> Tensor:
        with attach(network, strategy):
            return denoise(network, latents[rows], text[[*rows, *(row + 3 for row in rows)]], split=False)

    together = run([0, 1, 2])
    torch.testing.assert_close(together, torch.cat([run([row]) for row in range(3)]), rtol=1e-9, atol=1e-9)


def flow(network: nn.Module, strategy: CacheStrategy, *, split: bool) -> tuple[Tensor, CacheReport]:
    """Straight steps of a guided flow, the two halves with texts of their own."""
    inputs = {
        name: value.double() if name in TEXT else value
        for name, value in flux_inputs(network, 2, (16, 16)).items()
        if value is not None
    }
    halves = [
        {name: value[row : row + 1] if name in TEXT else value for name, value in inputs.items()} for row in range(2)
    ]
    latents = start(0, 1, 64, 16)
    with attach(network, strategy) as report:
        for time in torch.linspace(1, 0.1, STEPS, dtype=torch.float64):
            if split:
                parts = []
                for name, half in zip(("uncond", "cond"), halves, strict=True):
                    with network.cache_context(name):
                        parts.append(network(latents, timestep=time[None], **half, return_dict=False)[0])
            else:
                both = network(torch.cat([latents] * 2), timestep=time.expand(2), **inputs, return_dict=False)[0]
                parts = list(both.chunk(2))
            latents = latents - (parts[0] + 3 * (parts[1] - parts[0])) / STEPS
    return latents, report


@pytest.mark.parametrize("forecast", [False, True])
def test_the_first_block_cache_gives_the_same_for_guidance_batched_and_split(forecast: bool) -> None:
    network = small_flux().double()
    strategy = FirstBlockCache(0.4, 3, forecast)
    batched, one = flow(network, strategy, split=False)
    split, two = flow(network, strategy, split=True)
    torch.testing.assert_close(split, batched, rtol=1e-6, atol=1e-6)
    assert [two.decisions[0::2], two.decisions[1::2]] == one.item_decisions
    assert 0 < two.reused < two.computed + two.reused - 2


def test_a_lane_that_begins_within_a_run_counts_on_from_its_step() -> None:
    """What its calls weigh to the sampler, and where they lie, goes by the number of the step."""

    class Noted(Run):
        def step(self, call: Call, lane: Lane) -> tuple[Any, tuple[bool, ...]]:
            numbers.append((call.lane, lane.calls))
            return call.run(), (True,)

    numbers: list[tuple[str | None, int]] = []
    network = nn.Linear(1, 1)
    run = Noted(Denoiser(network), CacheReport("noted"), corrects=False)
    with run.attached():
        for step in range(4):
            for lane in ("cond", "uncond")[: 1 + (step > 1)]:
                with network.cache_context(lane):  # type: ignore[operator]
                    network(torch.zeros(1))
    assert numbers == [("cond", 0), ("cond", 1), ("cond", 2), ("uncond", 2), ("cond", 3), ("uncond", 3)]
