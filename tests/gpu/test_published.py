"""On the device: DeepCache equals the published helper, the first-block cache diffusers' own hook, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cache import DeepCache
from tests.cache.networks import FAMILIES, Family
from tests.cache.test_deepcache_published import ours, published
from tests.cache.test_first_block_published import compare

BY_NAME = {family.name: family for family in FAMILIES}


def on(device: str, family: Family) -> Family:
    """Its networks there; its loop stays on the CPU."""

    def move(tree: Any, where: str) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(where), tree)

    def build() -> nn.Module:
        network = family.build().to(device)
        network.register_forward_pre_hook(lambda _, args, kwargs: move((args, kwargs), device), with_kwargs=True)
        network.register_forward_hook(lambda _, args, output: move(output, "cpu"))
        return network

    return replace(family, build=build)


@pytest.mark.parametrize(("name", "branch"), [("sd", 0), ("sd", 11), ("sdxl", 4)])
@torch.no_grad()
def test_deepcache_equals_the_published_helper(device: str, name: str, branch: int) -> None:
    network = on(device, BY_NAME[name]).build()
    expected = published(network, branch, interval=3)
    latents, report = ours(network, branch, DeepCache(interval=3, depth=0, forecast=False))
    assert report.decisions == "CRRC"
    assert [torch.equal(a, b) for a, b in zip(latents, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.25, 1.0])
@torch.no_grad()
def test_the_first_block_cache_equals_diffusers_hook(device: str, threshold: float, dtype: torch.dtype) -> None:
    family = on(device, BY_NAME["flux"])
    compare(family, family.build().to(dtype), threshold, dtype)
