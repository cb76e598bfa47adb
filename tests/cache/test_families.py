"""Other families' transformers: each is one file of `families/`, and the caches know none of their names."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache import FirstBlockCache, IncompatibleDenoiser, TransformerDenoiser, attach, flops, view_of
from cache.solver import responses
from tests.cache.families import chroma, cogvideox, flux2, sd3, wan, z_image

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


def chroma_by_hand(network: nn.Module, threshold: float) -> tuple[list[Tensor], str]:
    """The root's forward written out around the rule; diffusers' hook does not know Chroma."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    latents, extra = chroma.start(1), chroma.conditioning(1)
    double, single = network.transformer_blocks, network.single_transformer_blocks
    rest = {
        "image_rotary_emb": network.pos_embed(torch.cat([extra["txt_ids"], extra["img_ids"]])),
        "attention_mask": extra["attention_mask"],
    }
    probe = tail = torch.empty(0)
    results, letters = [], ""
    for timestep in scheduler.timesteps:
        image, text = network.x_embedder(latents), network.context_embedder(extra["encoder_hidden_states"])
        modulations = network.distilled_guidance_layer(network.time_text_embed(timestep[None]))
        of_singles, of_images, of_texts, last = modulations.split([3 * 4, 6 * 3, 6 * 3, 2], dim=1)
        doubles = [torch.cat(pair, dim=1) for pair in zip(of_images.split(6, 1), of_texts.split(6, 1), strict=True)]
        text, head = double[0](hidden_states=image, encoder_hidden_states=text, temb=doubles[0], **rest)
        residual = head - image
        if letters and (residual - probe).abs().mean() / probe.abs().mean() < threshold:
            letters, out = letters + "R", head + tail
        else:
            letters, probe, out = letters + "C", residual, head
            for block, own in zip(double[1:], doubles[1:], strict=True):
                text, out = block(hidden_states=out, encoder_hidden_states=text, temb=own, **rest)
            both = torch.cat([text, out], dim=1)
            for block, own in zip(single, of_singles.split(3, 1), strict=True):
                both = block(hidden_states=both, temb=own, **rest)
            out = both[:, chroma.TEXT :]
            tail = out - head
        velocity = network.proj_out(network.norm_out(out, last))
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        results.append(latents)
    return results, letters


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers, about its own
@pytest.mark.parametrize(("family", "by_hand"), [(sd3, sd3_by_hand), (chroma, chroma_by_hand)], ids=["sd3", "chroma"])
def test_a_run_equals_the_forward_written_out(
    family: ModuleType, by_hand: Callable[[nn.Module, float], tuple[list[Tensor], str]]
) -> None:
    network = family.build()
    with attach(network, FirstBlockCache(1e-9, forecast=False)) as report:
        list(family.steps(network, steps=STEPS))
    changes = sorted(change for change in report.residuals if change is not None)
    rates = set()
    for threshold in (0.5 * changes[0], 1.01 * changes[3], 1.01 * changes[6], 1.0):
        expected, letters = by_hand(network, threshold)
        with attach(network, FirstBlockCache(threshold, forecast=False)) as report:
            latents = list(family.steps(network, steps=STEPS))
        assert report.decisions == letters
        assert [torch.equal(a, b) for a, b in zip(latents, expected, strict=True)] == [True] * STEPS
        rates.add(report.hit_rate)
    assert len(rates) > 2


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("lists", [None, ["transformer_blocks"], ["single_transformer_blocks"]])
def test_items_decide_apart_where_each_block_has_something_of_its_own(lists: list[str] | None) -> None:
    """Item 0 stands still, item 1 jumps: both are right, to the rounding of another batch size."""
    network = chroma.build()
    inputs = {"timestep": torch.tensor([0.5, 0.5]), **chroma.conditioning(2)}
    first = chroma.start(2)
    second = torch.stack([first[0], chroma.start(1, seed=9)[0]])
    expected = [network(one, **inputs).sample for one in (first, second)]
    with attach(TransformerDenoiser(network, block_lists=lists), FirstBlockCache(0.05)) as report:
        assert torch.equal(network(first, **inputs).sample, expected[0])
        for _ in range(2):
            torch.testing.assert_close(network(second, **inputs).sample, expected[1], rtol=1e-4, atol=1e-5)
    assert report.item_decisions == ["CRR", "CCR"]


def aura_flow() -> AuraFlowTransformer2DModel:
    """Its second list runs over text and image in one tensor."""
    torch.manual_seed(0)
    return AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    ).eval()


def test_streams_that_a_root_joins_are_followed() -> None:
    network = aura_flow()
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 4, 16),
        "timestep": torch.tensor([0.5]),
    }
    lists = ["joint_transformer_blocks", "single_transformer_blocks"]
    expected = network(**inputs)[0]
    with attach(TransformerDenoiser(network, block_lists=lists), FirstBlockCache(0.9)) as report:
        assert torch.equal(network(**inputs)[0], expected)
        torch.testing.assert_close(network(**inputs)[0], expected, rtol=1e-5, atol=1e-6)
    assert report.decisions == "CR"
    turned = TransformerDenoiser(network, block_lists=lists, streams=("hidden_states", "encoder_hidden_states"))
    with pytest.raises(IncompatibleDenoiser), attach(turned, FirstBlockCache(0.9)):
        network(**inputs)


def test_what_one_view_has_seen_is_not_taken_for_another() -> None:
    """Of as many tokens of text as of the image the streams are alike in shape, and joined in the wrong order."""
    network, lists = aura_flow(), ["joint_transformer_blocks", "single_transformer_blocks"]
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "timestep": torch.tensor([0.5]),
    }
    with attach(TransformerDenoiser(network, block_lists=lists), FirstBlockCache(0.9)):
        network(**inputs)
    names = ("hidden_states", "encoder_hidden_states")
    turned = TransformerDenoiser(network, block_lists=lists, streams=names)
    with pytest.raises(IncompatibleDenoiser, match="changes hidden_states"), attach(turned, FirstBlockCache(0.9)):
        network(**inputs)


def test_a_network_that_was_seen_is_not_kept() -> None:
    network = flux2.build()
    with attach(network, FirstBlockCache(0.9)) as report:
        list(flux2.steps(network, steps=2))
    assert len(report.decisions) == 2
    seen = weakref.ref(network)
    del network
    gc.collect()
    assert seen() is None


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


@pytest.mark.parametrize("family", [flux2, z_image], ids=["flux2", "z_image"])
def test_streams_in_one_tensor_are_cached_bit_for_bit(family: ModuleType) -> None:
    network = family.build()
    plain = list(family.steps(network, steps=STEPS))
    with attach(network, FirstBlockCache(1e-9, forecast=False)) as report:
        computed = list(family.steps(network, steps=STEPS))
    assert all(torch.equal(a, b) for a, b in zip(computed, plain, strict=True))
    changes = sorted(change for change in report.residuals if change is not None)
    rates = set()
    for threshold in (1.01 * changes[2], 1.5 * changes[-1], 1.0):
        expected, letters = by_blocks(family, threshold)
        with attach(network, FirstBlockCache(threshold, forecast=False)) as report:
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
    assert report.decisions == "CRCRCC"  # the last call computes
    assert report.settings["correction"] is True
    with attach(network, FirstBlockCache(1.0, max_consecutive=1)) as plain:
        assert not torch.equal(list(z_image.steps(network))[-1], corrected)
    assert plain.settings["correction"] is False
