"""What every strategy promises on every family: exact when neutral, counted, isolated, and gone afterwards."""

from __future__ import annotations

import copy
import functools
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from cache import AlreadyAttached, CacheStrategy, DeepCache, Denoiser, FirstBlockCache, NoCache, attach
from cache.views.base import Response
from tests.cache.networks import Family

STEPS = 6  # of `Family.denoise`


class Stopped(BaseException):
    """Not an Exception, as a cancel need not be one."""


def view(family: Family, network: nn.Module) -> Denoiser:
    """For a run of a sampler whose every call weighs the same."""
    return family.view(network).sampled(lambda: Response([1.0] * 100))


def deepest_that_always_runs(family: Family, network: nn.Module) -> nn.Module:
    """A layer that reuse calls run as well, near the network's end."""
    return network.conv_norm_out if family.is_unet else network.norm_out  # type: ignore[return-value]


def cached(family: Family, network: nn.Module, strategy: CacheStrategy, **settings: object) -> Tensor:
    with attach(view(family, network), strategy):
        return family.denoise(network, **settings)


@functools.cache
def first(family: Family, network: nn.Module, strategy: CacheStrategy | None, **settings: object) -> Tensor:
    """The latents of the session's first run with these settings, without a cache if there is no strategy.

    What a test has left behind is thus seen by all that follow.
    """
    return family.denoise(network, **settings) if strategy is None else cached(family, network, strategy, **settings)


def test_neutral_settings_change_no_bit(family: Family, network: nn.Module, neutral: CacheStrategy) -> None:
    plain = first(family, network, None)
    with attach(view(family, network), neutral) as report:
        result = family.denoise(network)
    assert torch.equal(result, plain)
    assert report.decisions == "C" * STEPS


def test_every_call_is_counted_once(family: Family, network: nn.Module, strategy: CacheStrategy) -> None:
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    with attach(view(family, network), strategy) as report:
        family.denoise(network)
    handle.remove()
    assert report.computed + report.reused == len(report.decisions) == len(calls) == STEPS
    assert report.hit_rate == report.reused / STEPS
    assert report.decisions[0] == "C"
    assert (report.reused > 0) == (not isinstance(strategy, NoCache))
    assert json.loads(json.dumps(report.as_dict()))["decisions"] == report.decisions
    assert report.warnings == []


def test_a_reuse_call_changes_the_result_and_is_cheaper(
    family: Family, network: nn.Module, strategy: CacheStrategy
) -> None:
    """Guards the other tests: a cache that never acted would pass them."""
    if isinstance(strategy, NoCache):
        assert torch.equal(cached(family, network, strategy), first(family, network, None))
        return
    layers: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: layers.append(path))
        for path, module in network.named_modules()
        if not list(module.children())
    ]
    ran: dict[str, set[int]] = {"C": set(), "R": set()}
    with attach(view(family, network), strategy) as report:
        for latents in family.steps(network):
            last = latents
            ran[report.decisions[-1]].add(len(layers))
            layers.clear()
    for handle in handles:
        handle.remove()
    assert len(ran["C"]) == len(ran["R"]) == 1
    assert max(ran["R"]) < max(ran["C"]) / 2
    assert not torch.equal(last, first(family, network, None))


def test_runs_repeat_exactly_and_leave_the_plain_network(
    family: Family, network: nn.Module, strategy: CacheStrategy
) -> None:
    plain = first(family, network, None)
    expected = first(family, network, strategy)
    cached(family, network, strategy, seed=7)
    assert torch.equal(cached(family, network, strategy), expected)
    assert torch.equal(family.denoise(network), plain)


@pytest.mark.parametrize("failing_call", [0, 3])
def test_after_an_exception_in_a_call_the_next_run_is_exact(
    family: Family, network: nn.Module, strategy: CacheStrategy, failing_call: int, snapshot: Callable[[], object]
) -> None:
    expected = first(family, network, strategy)
    before = snapshot()
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        if calls == failing_call:
            raise Stopped
        calls += 1

    layer = deepest_that_always_runs(family, network)

    def failing_run() -> None:
        with attach(view(family, network), strategy):
            handle = layer.register_forward_hook(fail)
            try:
                family.denoise(network)
            finally:
                handle.remove()
        raise Stopped  # the kept prediction's reuse calls run no layer: the run may end before the failing one

    with pytest.raises(Stopped):
        failing_run()
    assert snapshot() == before
    assert torch.equal(cached(family, network, strategy), expected)


def test_an_exception_inside_the_context_costs_only_its_own_run(
    family: Family, network: nn.Module, strategy: CacheStrategy
) -> None:
    """A caller that catches the error and denoises again in the same context starts from nothing."""
    expected = first(family, network, strategy)
    layer = deepest_that_always_runs(family, network)

    def fail(*_: object) -> None:
        raise Stopped

    with attach(view(family, network), strategy) as report:
        handle = layer.register_forward_hook(fail)
        with pytest.raises(Stopped):
            family.denoise(network, seed=3)
        handle.remove()
        assert report.decisions == ""
        assert torch.equal(family.denoise(network), expected)


def test_a_cancel_between_steps_leaves_nothing(
    family: Family, network: nn.Module, strategy: CacheStrategy, snapshot: Callable[[], object]
) -> None:
    before, expected = snapshot(), first(family, network, strategy)

    def cancelled_run() -> None:
        with attach(view(family, network), strategy):
            for step, _ in enumerate(family.steps(network)):
                if step == 3:
                    raise Stopped

    with pytest.raises(Stopped):
        cancelled_run()
    assert snapshot() == before
    assert torch.equal(cached(family, network, strategy), expected)


def test_another_size_follows_cleanly(family: Family, network: nn.Module, strategy: CacheStrategy) -> None:
    expected = first(family, network, strategy, size=(16, 24))
    with attach(view(family, network), strategy) as report:
        family.denoise(network, size=(16, 16))
        assert torch.equal(family.denoise(network, size=(16, 24)), expected)
    assert report.decisions[STEPS] == "C"


def test_a_size_that_is_come_back_to_computes_first_and_goes_on_from_its_own_history(
    family: Family, network: nn.Module, strategy: CacheStrategy
) -> None:
    """Sizes in turn, as multi-scale has them: what a call at one size reuses was never of another.

    Three calls a turn, so that every turn holds a reuse. A second run with other inputs at the second size must give
    the same at the first.
    """

    def turns(other_seed: int) -> tuple[list[Tensor], str]:
        with attach(view(family, network), strategy) as report, torch.no_grad():
            one, other = family.steps(network), family.steps(network, size=(16, 24), seed=other_seed)
            results = []
            for run in (one, other, one):
                results.append([next(run) for _ in range(3)])
        return results[0] + results[2], report.decisions

    results, decisions = turns(1)
    again, _ = turns(2)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert [decisions[at] for at in (0, 3, 6)] == ["C", "C", "C"]
    windowed = isinstance(strategy, DeepCache) and strategy.end < 1000
    assert ("R" in decisions[7:]) == (not isinstance(strategy, NoCache) and not windowed)


def test_the_network_is_restored_exactly(
    family: Family, network: nn.Module, strategy: CacheStrategy, snapshot: Callable[[], object]
) -> None:
    before = snapshot()
    with attach(view(family, network), strategy):
        assert snapshot() != before  # the snapshot sees patches
        family.denoise(network)
    assert snapshot() == before


def test_a_second_attach_is_refused_until_the_first_is_left(
    family: Family, network: nn.Module, strategy: CacheStrategy
) -> None:
    other = DeepCache() if family.is_unet else FirstBlockCache()
    expected = first(family, network, strategy)
    with attach(view(family, network), strategy):
        for second in (strategy, other, NoCache()):
            with pytest.raises(AlreadyAttached, match="already attached"), attach(network, second):
                pass
        assert torch.equal(family.denoise(network), expected)
    with attach(network, other):
        pass


@functools.cache
def twin_of(network: nn.Module) -> nn.Module:
    """A copy, made once: counting the operations of a new network takes longer than denoising with it."""
    return copy.deepcopy(network)


def test_interleaved_runs_are_exact(family: Family, network: nn.Module, strategy: CacheStrategy) -> None:
    """Two networks, step by step in turn, one cached and one not or both cached."""
    twin = twin_of(network)
    expected = [first(family, network, strategy), first(family, network, strategy, seed=5)]
    with ExitStack() as stack:
        stack.enter_context(attach(view(family, network), strategy))
        stack.enter_context(attach(view(family, twin), strategy))
        *_, last = zip(family.steps(network, seed=0), family.steps(twin, seed=5), strict=True)
    assert [torch.equal(a, b) for a, b in zip(last, expected, strict=True)] == [True, True]


def count_from_here() -> None:
    """From now on `live_bytes` sees what is made; all older objects are set aside, which saves time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def older_objects_set_aside() -> Iterator[None]:
    """Those of other modules once for all of these tests, which then need not go through them."""
    count_from_here()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all tensors alive that hold data, each storage counted once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) is Tensor and item.device.type != "meta"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held_after_each_step(family: Family, network: nn.Module, strategy: CacheStrategy) -> tuple[list[int], list[int]]:
    """Bytes alive after each step, and what the report has said until then."""
    alive, said = [], []
    with attach(view(family, network), strategy) as report:
        for latents in family.steps(network):
            alive.append(live_bytes())
            said.append(report.cache_bytes)
            del latents
    return alive, said


def test_cache_bytes_are_what_is_kept_and_it_is_gone_after_the_run(
    family: Family, network: nn.Module, strategy: CacheStrategy
) -> None:
    """Every storage alive between two calls is counted, with the cache and without; the difference is what it keeps."""
    first(family, network, strategy)  # whatever is counted once, is
    count_from_here()
    plain, _ = held_after_each_step(family, network, NoCache())
    assert live_bytes() == 0
    alive, said = held_after_each_step(family, network, strategy)
    assert live_bytes() == 0
    kept = [with_cache - without for with_cache, without in zip(alive, plain, strict=True)]
    assert said == [max(kept[: step + 1]) for step in range(STEPS)]
    assert (said[-1] > 0) == (not isinstance(strategy, NoCache))


def test_nothing_is_kept_after_an_abort(family: Family, network: nn.Module, strategy: CacheStrategy) -> None:
    first(family, network, strategy)

    def aborted_run() -> None:
        with attach(view(family, network), strategy):
            for _ in family.steps(network):
                raise Stopped

    count_from_here()
    with pytest.raises(Stopped):
        aborted_run()
    assert live_bytes() == 0
