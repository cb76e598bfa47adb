"""The first-block cache against diffusers' own hook: the same decisions and the same bits."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import nn

from cache import FirstBlockCache, attach
from tests.cache.networks import FAMILIES, Family

STEPS = 10
# Other families stand in test_families.py.
TRANSFORMERS = {family.name: family for family in FAMILIES if "flux" in family.name}
NETWORKS: dict[str, nn.Module] = {}


def network_of(family: Family) -> nn.Module:
    if family.name not in NETWORKS:
        NETWORKS[family.name] = family.build()
    return NETWORKS[family.name]


def hooked(family: Family, threshold: float) -> tuple[nn.Module, list[str]]:
    """A twin under diffusers' hook, and the letters of its calls as seen from the second block's attention."""
    twin = family.build()
    apply_first_block_cache(twin, FirstBlockCacheConfig(threshold=threshold))
    letters: list[str] = []
    twin.register_forward_pre_hook(lambda *_: letters.append("R"))
    twin.transformer_blocks[1].attn.register_forward_hook(lambda *_: letters.__setitem__(-1, "C"))
    return twin, letters


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("threshold", [0.05, 0.25, 0.3, 0.4, 0.6, 0.8, 1.0])
@torch.no_grad()
def test_every_step_equals_diffusers_hook_bit_for_bit(name: str, threshold: float) -> None:
    compare(TRANSFORMERS[name], network_of(TRANSFORMERS[name]), threshold, torch.float32)


@pytest.mark.parametrize("threshold", [0.25, 0.3, 0.4])
@torch.no_grad()
def test_decisions_are_rounded_as_the_hooks_are_in_half_precision(threshold: float) -> None:
    """A mean in bfloat16 has three digits: in another precision a call near the threshold would decide otherwise."""
    network = TRANSFORMERS["flux"].build().to(torch.bfloat16)
    compare(TRANSFORMERS["flux"], network, threshold, torch.bfloat16)


def compare(family: Family, network: nn.Module, threshold: float, dtype: torch.dtype) -> None:
    twin, letters = hooked(family, threshold)
    expected = list(family.steps(twin.to(dtype), steps=STEPS))
    with attach(network, FirstBlockCache(threshold, forecast=False)) as report:
        latents = list(family.steps(network, steps=STEPS))
    assert report.decisions == "".join(letters)
    assert [torch.equal(a, b) for a, b in zip(latents, expected, strict=True)] == [True] * STEPS


@torch.no_grad()
def test_the_thresholds_above_mix_both_decisions() -> None:
    family = TRANSFORMERS["flux"]
    rates = []
    for threshold in (0.05, 0.25, 0.3, 1.0):
        with attach(network_of(family), FirstBlockCache(threshold, forecast=False)) as report:
            family.denoise(network_of(family), steps=STEPS)
        rates.append(report.hit_rate)
    assert rates == sorted(rates)
    assert 0 < rates[1] < rates[2] < rates[3] == 0.9
