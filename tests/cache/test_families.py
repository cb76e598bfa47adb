"""Other families' transformers: each is one file of `families/`, and the caches know none of their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache import FirstBlockCache, IncompatibleDenoiser, attach, flops, view_of
from cache.solver import responses
from tests.cache.families import auraflow, cogvideox, flux2, sd3, wan, z_image

STEPS = 10
THRESHOLDS = [0.02, 0.05, 0.1, 0.2, 0.4, 1.0]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def hooked(family: ModuleType, threshold: float) -> tuple[list[Tensor], str]:
    """A run under diffusers' hook, and its letters as seen from the second block's attention."""
    twin = family.build()
    apply_first_block_cache(twin, FirstBlockCacheConfig(threshold=threshold))
    letters: list[str] = []
    blocks = twin.blocks if hasattr(twin, "blocks") else twin.transformer_blocks
    twin.register_forward_pre_hook(lambda *_: letters.append("R"))
    blocks[1].attn1.register_forward_hook(lambda *_: letters.__setitem__(-1, "C"))
    return list(family.steps(twin, steps=STEPS)), "".join(letters)


@pytest.mark.parametrize("family", [wan, cogvideox], ids=["wan", "cogvideox"])
def test_every_step_equals_diffusers_hook_bit_for_bit(family: ModuleType) -> None:
    network = family.build()
    view = family.view(network) if hasattr(family, "view") else view_of(network)
    rates = set()
    for threshold in THRESHOLDS:
        expected, letters = hooked(family, threshold)
        with attach(view, FirstBlockCache(threshold, forecast=False)) as report:
            latents = list(family.steps(network, steps=STEPS))
        assert report.decisions == letters
        assert [torch.equal(a, b) for a, b in zip(latents, expected, strict=True)] == [True] * STEPS
        rates.add(report.hit_rate)
    assert len(rates) > 2  # the thresholds mix both decisions


def sd3_by_hand(network: nn.Module, threshold: float) -> tuple[list[Tensor], str]:
    """The root's forward written out around the rule; diffusers' hook does not take a last block without text."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    extra, blocks = sd3.conditioning(1), network.transformer_blocks
    probe = tail = torch.empty(0)
    results, letters = [], ""
    for timestep in scheduler.timesteps:
        image = network.pos_embed(latents)
        embedding = network.time_text_embed(timestep[None], extra["pooled_projections"])
        text = network.context_embedder(extra["encoder_hidden_states"])
        text, head = blocks[0](hidden_states=image, encoder_hidden_states=text, temb=embedding)
        residual = head - image
        if letters and (residual - probe).abs().mean() / probe.abs().mean() < threshold:
            letters, out = letters + "R", head + tail
        else:
            letters, probe, out = letters + "C", residual, head
            for block in blocks[1:]:
                text, out = block(hidden_states=out, encoder_hidden_states=text, temb=embedding)
            tail = out - head
        out = network.proj_out(network.norm_out(out, embedding)).reshape(1, 8, 8, 2, 2, 4)
        velocity = torch.einsum("nhwpqc->nchpwq", out).reshape(1, 4, 16, 16)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        results.append(latents)
    return results, letters


def test_sd3_equals_its_forward_written_out() -> None:
    network = sd3.build()
    with attach(network, FirstBlockCache(1e-9, forecast=False)) as report:
        list(sd3.steps(network, steps=STEPS))
    changes = sorted(change for change in report.residuals if change is not None)
    rates = set()
    for threshold in (0.5 * changes[0], 1.01 * changes[3], 1.5 * changes[-1], 1.0):
        expected, letters = sd3_by_hand(network, threshold)
        with attach(network, FirstBlockCache(threshold, forecast=False)) as report:
            latents = list(sd3.steps(network, steps=STEPS))
        assert report.decisions == letters
        assert [torch.equal(a, b) for a, b in zip(latents, expected, strict=True)] == [True] * STEPS
        rates.add(report.hit_rate)
    assert len(rates) > 2


def test_streams_in_another_order_than_the_views_are_refused_not_mixed_up() -> None:
    network = cogvideox.build()
    with (
        pytest.raises(IncompatibleDenoiser, match="in the order in which the blocks return them"),
        attach(network, FirstBlockCache(1.0)),
    ):
        list(cogvideox.steps(network))


@pytest.mark.parametrize("family", [sd3, wan, flux2, z_image], ids=["sd3", "wan", "flux2", "z_image"])
def test_reuse_costs_equal_the_operations_of_a_reuse_call(family: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_OPERATIONS", {})  # else those of whichever size was counted first
    network = family.build()
    operations = []
    # The counter does not know the CPU's fused attention, so that attention runs as the two products that it is.
    with sdpa_kernel(SDPBackend.MATH), attach(network, FirstBlockCache(1.0)) as report:
        run = family.steps(network, steps=20)  # the first two are near each other
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                next(run)
            operations.append(counter.get_total_flops())
    assert report.decisions == "CR"
    assert report.reuse_cost == pytest.approx(operations[1] / operations[0], rel=1e-9)


def by_blocks(family: ModuleType, threshold: float) -> tuple[list[Tensor], str]:
    """A run whose blocks pass on what they get in a reuse call, but for the last, which adds what was kept."""
    twin, letters, kept = family.build(), [], {}
    blocks = [block for name in family.LISTS for block in getattr(twin, name)]

    def image(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        taken: Tensor = args[0] if args else kwargs["hidden_states"]
        return taken

    def first(own: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            text, head = result if isinstance(result, tuple) else (None, result)
            change = head - image(args, kwargs)
            reuses = bool(letters) and (change - kept["probe"]).abs().mean() / kept["probe"].abs().mean() < threshold
            letters.append("R" if reuses else "C")
            if not reuses:
                kept["probe"] = change
            kept["head"] = head if text is None else torch.cat([text, head], dim=1)
            return result

        return forward

    def further(own: Any, last: bool) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if letters[-1] == "R":
                passed = image(args, kwargs)
                text = kwargs.get("encoder_hidden_states")
                return passed + kept["tail"] if last else passed if text is None else (text, passed)
            result = own(*args, **kwargs)
            if last:
                kept["tail"] = result - kept["head"]
            return result

        return forward

    blocks[0].forward = first(blocks[0].forward)
    for block in blocks[1:]:
        block.forward = further(block.forward, block is blocks[-1])
    return list(family.steps(twin, steps=STEPS)), "".join(letters)


@pytest.mark.parametrize("family", [flux2, auraflow, z_image], ids=["flux2", "auraflow", "z_image"])
def test_streams_in_one_tensor_are_cached_bit_for_bit(family: ModuleType) -> None:
    network = family.build()
    view = family.view(network) if hasattr(family, "view") else view_of(network)
    plain = list(family.steps(network, steps=STEPS))
    with attach(view, FirstBlockCache(1e-9, forecast=False)) as report:
        computed = list(family.steps(network, steps=STEPS))
    assert all(torch.equal(a, b) for a, b in zip(computed, plain, strict=True))
    changes = sorted(change for change in report.residuals if change is not None)
    rates = set()
    for threshold in (1.01 * changes[2], 1.5 * changes[-1], 1.0):
        expected, letters = by_blocks(family, threshold)
        with attach(view, FirstBlockCache(threshold, forecast=False)) as report:
            latents = list(family.steps(network, steps=STEPS))
        assert report.decisions == letters
        assert [torch.equal(a, b) for a, b in zip(latents, expected, strict=True)] == [True] * STEPS
        rates.add(report.hit_rate)
    assert len(rates) > 1


def test_items_in_lists_decide_each_for_itself() -> None:
    """Texts of one length, and of several: then the shorter are filled up, and the attention masked."""
    network = z_image.build()
    for lengths in ((5, 9), (5, 40)):
        with attach(network, FirstBlockCache(1e-9, forecast=False)) as report:
            list(z_image.steps(network, steps=STEPS, lengths=lengths))
        assert report.item_decisions == ["C" * STEPS] * 2
        threshold = sorted(change for each in report.item_residuals for change in each)[STEPS]
        with attach(network, FirstBlockCache(threshold, forecast=False)) as report:
            together = list(z_image.steps(network, steps=STEPS, lengths=lengths))[-1]
        assert report.item_decisions[0] != report.item_decisions[1]
        assert all("R" in letters for letters in report.item_decisions)
        assert together.isfinite().all()


def test_lists_of_predictions_are_corrected_like_tensors() -> None:
    network = z_image.build()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    view = view_of(network).sampled(lambda: responses(scheduler))
    with attach(view, FirstBlockCache(1.0, max_consecutive=1)) as report:
        corrected = list(z_image.steps(network))[-1]
    assert report.decisions == "CRCRCR"
    assert report.settings["correction"] is True
    with attach(network, FirstBlockCache(1.0, max_consecutive=1)) as plain:
        assert not torch.equal(list(z_image.steps(network))[-1], corrected)
    assert plain.settings["correction"] is False
