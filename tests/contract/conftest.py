"""The contract's parameters: every strategy with every family whose network it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from tests.cache.networks import FAMILIES, Family

# Settings under which each strategy reuses some of six calls on every network here, and computes some; the forecast is
# made from as many values as it can use.
ON_UNETS: list[CacheStrategy] = [
    NoCache(),
    DeepCache(interval=3, depth=0, forecast=False),
    DeepCache(interval=2, depth=2, start=200, end=800),
    DeepCache(interval=2, depth=0, schedule=(0, 1, 2, 4)),
    DeepCache(interval=2, depth=12),  # no branch is cheap enough: the prediction is kept
    DeepCache(interval=3, depth=0, guidance="reuse"),
]
ON_TRANSFORMERS: list[CacheStrategy] = [
    NoCache(),
    FirstBlockCache(1.0, max_consecutive=2, forecast=False),
    FirstBlockCache(1.0, max_consecutive=2),
    FirstBlockCache(1.0, max_consecutive=1),
]
# On larger networks, and on families that show that a view suffices: one setting of each strategy.
ON_SAMPLED: list[CacheStrategy] = [ON_UNETS[3], ON_TRANSFORMERS[2]]
NEUTRAL_ON_UNETS: list[CacheStrategy] = [NoCache(), DeepCache(interval=1)]
NEUTRAL_ON_TRANSFORMERS: list[CacheStrategy] = [NoCache(), FirstBlockCache(threshold=0)]

_NETWORKS: dict[str, nn.Module] = {}


def network_of(family: Family) -> nn.Module:
    """The family's network, built once: a test that finds it changed by another has found a bug."""
    if family.name not in _NETWORKS:
        _NETWORKS[family.name] = family.build()
    return _NETWORKS[family.name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    lists = {
        "strategy": (ON_UNETS, ON_TRANSFORMERS),
        "neutral": (NEUTRAL_ON_UNETS, NEUTRAL_ON_TRANSFORMERS),
    }
    for fixture, (unets, transformers) in lists.items():
        if fixture in metafunc.fixturenames:
            cases = [
                pytest.param(family, strategy, id=f"{family.name}-{strategy}")
                for family in FAMILIES
                for strategy in (unets if family.is_unet else transformers)
                if not family.sampled or strategy in ON_SAMPLED or fixture == "neutral"
                if family.guided or getattr(strategy, "guidance", "full") == "full"
            ]
            metafunc.parametrize(("family", fixture), cases)


@pytest.fixture
def network(family: Family) -> nn.Module:
    return network_of(family)


Snapshot = dict[str, object]


@pytest.fixture
def snapshot(network: nn.Module) -> Callable[[], Snapshot]:
    """What of the network can be patched: attributes, children, hooks and forward of every module, by identity."""

    def take() -> Snapshot:
        found: Snapshot = {}
        for path, module in network.named_modules():
            for name, value in vars(module).items():
                inner = {key: id(item) for key, item in value.items()} if isinstance(value, dict) else None
                found[f"{path}:{name}"] = (id(value), inner)
        return found

    return take


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
