"""Operations, pairs, and peers that run beside ours and leave nothing behind."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.nn.functional import conv2d, scaled_dot_product_attention

from benchmarks.cache import settings as grid
from benchmarks.cache.measure import Bench, Operations, Result, difference, pairs
from benchmarks.cache.peers import cache_dit, diffusers_hook, published_deepcache, twin
from benchmarks.cache.settings import Setting, branches, ours, shares
from cache import DeepCache, FirstBlockCache, NoCache
from cache.flops import deepest_branch
from models.base import GenerationParams
from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.registry import Registry

STEPS = 6


def bench_of(model: Any, number: int = 2) -> Bench:
    params = GenerationParams(prompt="", width=64, height=64, steps=STEPS, guidance_scale=2.0)
    return Bench(model, params, [("a", 0), ("b", 1)][:number])


@torch.no_grad()
def test_operations_are_those_of_the_formulas() -> None:
    image, kernel = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    q, k = torch.randn(1, 2, 7, 4), torch.randn(1, 2, 9, 4)
    with Operations() as counted:
        torch.randn(4, 5) @ torch.randn(5, 6)
        conv2d(image, kernel, padding=1)
    assert counted.total == 2 * 4 * 5 * 6 + 2 * 2 * 64 * 5 * 27
    with Operations() as counted:
        scaled_dot_product_attention(q, k, k)
    assert counted.total == 2 * (2 * 2 * 7 * 9 * 4)  # two products for each of two heads


def test_pairs_repeat_prompts_with_new_seeds() -> None:
    all_pairs = pairs(20)
    assert len(set(all_pairs)) == 20
    assert sorted(seed for _, seed in all_pairs) == list(range(20))


def test_plain_reuse_and_the_published_helper_are_one_point(sd: Any) -> None:
    bench = bench_of(sd, 1)
    strategy = DeepCache(interval=2, depth=2, forecast=False)
    branch = deepest_branch(sd.denoiser.branch_costs, strategy.depth)
    assert branch is not None
    own = Setting("ours", "", ours(strategy))
    peer = Setting("peer", "", lambda host, steps: published_deepcache(host, steps, interval=2, branch=branch))
    first, second = bench.quality(own), bench.quality(peer)
    assert first.psnr_db == second.psnr_db
    assert first.operations == second.operations < bench.reference[1].operations
    assert first.hit_rate == second.hit_rate == 0.5
    assert first.operations_speedup == pytest.approx(first.predicted_speedup, rel=0.02)  # counted at 77 tokens of text
    assert first.identical == 0


def test_plain_reuse_and_diffusers_hook_are_one_point(flux: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    bench = bench_of(flux)
    own = Setting("ours", "", ours(FirstBlockCache(threshold=0.6, forecast=False)))
    config = FirstBlockCacheConfig(threshold=0.6)
    peer = Setting("peer", "", lambda host, steps: diffusers_hook(host, steps, config=config))
    first, second = bench.quality(own), bench.quality(peer)
    assert first.psnr_db == second.psnr_db
    assert first.hit_rate == second.hit_rate > 0
    assert first.operations == second.operations


@pytest.mark.skipif(find_spec("cache_dit") is None, reason="needs the bench extra")
def test_every_peer_acts_and_leaves_the_model_as_it_was(flux: Any) -> None:
    from diffusers import TaylorSeerCacheConfig

    bench = bench_of(flux, 1)
    network = flux.pipeline.transformer
    before = {name: id(module) for name, module in network.named_modules()}
    pace = {"residual_diff_threshold": 1e9, "Fn_compute_blocks": 1, "max_warmup_steps": 2}
    peers = {
        "taylor": lambda host, steps: diffusers_hook(host, steps, config=TaylorSeerCacheConfig(cache_interval=2)),
        "dbcache": lambda host, steps: cache_dit(host, steps, settings=pace),
        "dbcache taylor": lambda host, steps: cache_dit(host, steps, settings=pace, calibrator="TaylorSeer"),
    }
    rates = {}
    for name, make in peers.items():
        setting = Setting(name, "", make)
        result = bench.quality(setting)
        again = bench.quality(setting)  # a second run starts from nothing
        assert again.psnr_db == result.psnr_db
        rates[name] = result.hit_rate
    assert rates["dbcache"] == rates["dbcache taylor"] == pytest.approx((STEPS - 2) / STEPS)
    assert 0 < rates["taylor"] < 1
    assert flux.pipeline.transformer is network
    assert {name: id(module) for name, module in network.named_modules()} == before
    assert bench.quality(Setting("drawn again", "", ours(NoCache()))).identical == 1


def test_auto_is_nearer_than_uniform_on_tiny_sd() -> None:
    model = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get(DEFAULT)
    params = GenerationParams(prompt="", width=192, height=128, steps=30, guidance_scale=3.0, sampler="euler")
    bench = Bench(model, params, pairs(2))
    auto, even = (
        bench.quality(Setting("ours", schedule, ours(DeepCache(2, schedule=schedule))))  # type: ignore[arg-type]
        for schedule in ("auto", "uniform")
    )
    assert difference(auto, even)[0] > 0.5  # 4 dB here
    assert auto.hit_rate == even.hit_rate == 1 / 2


def test_timing_pairs_each_run_with_an_uncached_one(sd: Any) -> None:
    bench = bench_of(sd)
    setting = Setting("ours", "", ours(DeepCache(interval=3)))
    result = Result("ours", "")
    result = bench.timed(result, setting, 3)
    assert len(result.seconds) == len(result.uncached_seconds) == 3
    result.seconds, result.uncached_seconds = [0.5, 0.5, 30.0], [1.0, 2.0, 90.0]
    assert result.speedup == 3.0  # of 2, 4 and 3; the ratio of the medians would be 4


def test_a_twin_shares_the_weights_and_nothing_else(sd: Any) -> None:
    network = sd.pipeline.unet
    copied = twin(network)
    pairs_of = zip(network.parameters(), copied.parameters(), strict=True)
    assert all(a is b for a, b in pairs_of)
    assert copied.conv_in is not network.conv_in
    assert set(map(id, network.modules())).isdisjoint(map(id, copied.modules()))


def test_equal_settings_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two depths that choose one branch are one setting, and so are two shares of a run that are as many steps."""
    monkeypatch.setattr(grid, "DEPTHS", (0, 1, 2, 3))
    assert branches((0.08, 0.22, 0.38, 0.47)) == {3: 0, 1: 1, 0: 3}
    assert shares(20, (0.5, 0.51, 1.0)) == [10]
