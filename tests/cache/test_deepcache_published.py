"""DeepCache against the published helper (PyPI `DeepCache` 0.1.1): the same bits, for every branch."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler
from torch import Tensor, nn

from cache import DeepCache
from tests.cache.cut import Cut
from tests.cache.networks import FAMILIES, Family, denoise_unet

STEPS = 4
# The helper counts three skips a level, which is true of these.
BY_NAME = {family.name: family for family in FAMILIES if family.name in ("sd", "sdxl", "embedded tiny-sd")}
BRANCHES = [
    (name, branch)
    for name in BY_NAME
    for branch in range(0, 9 if name == "sdxl" else 12, 5 if name.startswith("embedded") else 1)
]  # of the trained model, whose structure is sd's, a few


@functools.cache
def network_of(family: Family) -> nn.Module:
    return family.build()


@functools.cache
def uncached(network: nn.Module) -> list[Tensor]:
    return list(denoise_unet(network, steps=STEPS))


def published(network: nn.Module, branch: int, interval: int) -> list[Tensor]:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)  # the helper looks the timestep up here
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=network, scheduler=scheduler))
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        return list(denoise_unet(network, steps=STEPS))
    finally:
        helper.disable()
        # The helper leaves its bound methods in the instances: not ours to be blamed for.
        for module in network.modules():
            module.__dict__.pop("forward", None)


def ours(network: nn.Module, branch: int, strategy: DeepCache) -> tuple[list[Tensor], Any]:
    with strategy.attach(Cut(network, branch)) as report:
        return list(denoise_unet(network, steps=STEPS)), report


@pytest.mark.parametrize(("name", "branch"), BRANCHES)
@torch.no_grad()
def test_every_branch_equals_the_published_helper_bit_for_bit(name: str, branch: int) -> None:
    network = network_of(BY_NAME[name])
    expected = published(network, branch, interval=2)
    latents, report = ours(network, branch, DeepCache(interval=2, depth=0, forecast=False))
    assert report.decisions == "CRCR"
    assert report.settings["branch"] == branch
    assert [torch.equal(a, b) for a, b in zip(latents, expected, strict=True)] == [True] * STEPS
    assert not torch.equal(latents[1], uncached(network)[1])  # the oracle acted as well
