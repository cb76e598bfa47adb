"""The transformer's view and the kept residuals: batches, passes apart, hostile numbers and hostile blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache import FirstBlockCache, IncompatibleDenoiser, TransformerDenoiser, attach
from tests.cache.families import sd3
from tests.cache.networks import Plain, denoise_flux, flux_inputs, tiny_flux


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def network() -> nn.Module:
    return tiny_flux()


def latents(seed: int, items: int = 1) -> Tensor:
    return torch.randn(items, 64, 16, generator=torch.Generator().manual_seed(seed))


def predict(network: nn.Module, hidden: Tensor, timestep: float = 0.5, **extra: Any) -> Tensor:
    items = len(hidden)
    inputs = flux_inputs(network, items, (16, 16)) | extra
    output: Tensor = network(hidden, timestep=torch.full((items,), timestep), **inputs, return_dict=False)[0]
    return output


def counted(network: nn.Module) -> list[list[int]]:
    """For each block, double then single, the batch sizes that it was called with."""
    sizes: list[list[int]] = []
    for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
        sizes.append([])
        block.register_forward_hook(lambda _m, _a, out, seen=sizes[-1]: seen.append(len(out[1])))
    return sizes


def test_a_reuse_call_runs_the_first_block_and_no_other(network: nn.Module) -> None:
    sizes = counted(network)
    with attach(network, FirstBlockCache(1.0)) as report:
        predict(network, latents(0))
        predict(network, latents(0) * 1.01)
    assert report.decisions == "CR"
    assert [len(seen) for seen in sizes] == [2] + [1] * 9


def test_reusing_for_the_same_input_answers_the_same_to_rounding(network: nn.Module) -> None:
    expected = predict(network, latents(0))
    with attach(network, FirstBlockCache(1.0)):
        assert torch.equal(predict(network, latents(0)), expected)
        # head + (tail - head) rounds once more than tail
        torch.testing.assert_close(predict(network, latents(0)), expected, rtol=1e-5, atol=1e-6)


def test_items_of_a_batch_decide_each_for_itself(network: nn.Module) -> None:
    """Item 0 stands still and reuses; item 1 jumps and computes, over the later blocks as a batch of one."""
    sizes = counted(network)
    first = latents(0, items=2)
    second = torch.stack([first[0] * 1.001, latents(9)[0]])
    with attach(network, FirstBlockCache(0.1)) as report:
        predict(network, first)
        mixed = predict(network, second)
        third = predict(network, second)
    assert report.item_decisions == ["CRR", "CCR"]
    assert report.decisions == "CCR"
    assert sizes[0] == [2, 2, 2]
    assert sizes[1:] == [[2, 1]] * 9
    # Each item as if it had been alone. The tolerance: a matrix product rounds by its batch size.
    conditions = flux_inputs(network, 2, (16, 16))
    for item in range(2):
        alone = {
            "encoder_hidden_states": conditions["encoder_hidden_states"][item : item + 1],
            "pooled_projections": conditions["pooled_projections"][item : item + 1],
        }
        with attach(network, FirstBlockCache(0.1)) as report:
            predict(network, first[item : item + 1], **alone)
            expected = [predict(network, second[item : item + 1], **alone) for _ in range(2)]
        assert report.decisions == ["CRR", "CCR"][item]
        torch.testing.assert_close(mixed[item : item + 1], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(third[item : item + 1], expected[1], rtol=1e-4, atol=1e-5)


def test_a_whole_run_of_a_batch_equals_the_runs_of_its_items(network: nn.Module) -> None:
    """Every item with the same text, starting at another scale, so that they reuse at different calls."""
    starts = [latents(3), latents(4) * 0.3, latents(5) * 2]
    text = {name: flux_inputs(network, 1, (16, 16))[name] for name in ("encoder_hidden_states", "pooled_projections")}

    def run(*items: Tensor) -> tuple[Tensor, list[str]]:
        hidden = torch.cat(items)
        extra = {name: value.expand(len(items), *value.shape[1:]) for name, value in text.items()}
        with attach(network, FirstBlockCache(0.3)) as report:
            for t in torch.linspace(1, 0.1, 10):
                hidden = hidden - 0.1 * predict(network, hidden, float(t), **extra)
        return hidden, report.item_decisions or [report.decisions]

    together, letters = run(*starts)
    alone = [run(start) for start in starts]
    assert letters == [decisions for _, (decisions,) in alone]
    assert len(set(letters)) > 1
    # The tolerance: a matrix product rounds by its batch size.
    torch.testing.assert_close(together, torch.cat([result for result, _ in alone]), rtol=1e-4, atol=1e-5)


def test_conditional_and_unconditional_calls_apart_keep_their_own(network: nn.Module) -> None:
    passes = {"cond": latents(0), "uncond": latents(1)}
    expected = {name: predict(network, hidden) for name, hidden in passes.items()}
    with attach(network, FirstBlockCache(1.0)) as report:
        for _ in range(2):
            for name, hidden in passes.items():
                with network.cache_context(name):
                    torch.testing.assert_close(predict(network, hidden), expected[name], rtol=1e-5, atol=1e-6)
    assert report.decisions == "CCRR"


@pytest.mark.parametrize(("cap", "expected"), [(1, "CRCRCR"), (3, "CRRRCR"), (None, "CRRRRR")])
def test_the_cap_limits_reuse_in_a_row(network: nn.Module, cap: int | None, expected: str) -> None:
    with attach(network, FirstBlockCache(1.0, max_consecutive=cap)) as report:
        for _ in range(6):
            predict(network, latents(0))
    assert report.decisions == expected


def test_the_threshold_is_strict_and_the_reference_is_the_last_computed_call(network: nn.Module) -> None:
    """Differences computed here from the first block's own inputs and outputs, in float64."""
    seen: list[Tensor] = []
    network.transformer_blocks[0].register_forward_hook(
        lambda _m, _a, kwargs, out: seen.append((out[1] - kwargs["hidden_states"]).double()), with_kwargs=True
    )
    with attach(network, FirstBlockCache(0.3, forecast=False)) as report:
        list(denoise_flux(network, steps=10))
    reference, letters, differences = seen[0], "C", [None]
    for residual in seen[1:]:
        difference = float((residual - reference).abs().mean() / reference.abs().mean())
        differences.append(difference)  # type: ignore[arg-type]
        letters += "R" if difference < 0.3 else "C"
        reference = reference if difference < 0.3 else residual
    assert report.decisions == letters
    assert report.residuals[0] is None
    assert report.residuals[1:] == pytest.approx(differences[1:], rel=1e-4)
    at_the_edge = report.residuals[1]
    assert at_the_edge is not None
    with attach(network, FirstBlockCache(at_the_edge, forecast=False)) as report:
        list(denoise_flux(network, steps=2))
    assert report.decisions == "CC"


def test_numbers_that_are_none_compute_and_are_said(network: nn.Module) -> None:
    with attach(network, FirstBlockCache(1.0)) as report:
        predict(network, latents(0))
        assert predict(network, torch.full((1, 64, 16), torch.nan)).isnan().all()
        predict(network, latents(0))  # the reference is not a number: computed, and a good reference again
        predict(network, latents(0))
    assert report.decisions == "CCCR"
    assert report.residuals == [None, None, None, 0.0]
    assert any("not a number" in sentence for sentence in report.warnings)


def test_a_zero_residual_computes(network: nn.Module) -> None:
    block = network.transformer_blocks[0]
    block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    expected = [predict(network, latents(seed)) for seed in range(3)]
    with attach(network, FirstBlockCache(1.0)) as report:
        assert all(torch.equal(predict(network, latents(seed)), expected[seed]) for seed in range(3))
    assert report.decisions == "CCC"
    assert any("zero" in sentence for sentence in report.warnings)


def write_in_place(block: nn.Module) -> None:
    """Let the block put its results into its inputs, as memory-saving implementations do."""
    forward = block.forward

    def in_place(hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        text, image = forward(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **rest)
        return encoder_hidden_states.copy_(text), hidden_states.copy_(image)

    block.forward = in_place  # type: ignore[method-assign]


@pytest.mark.parametrize("index", [0, 1, 5])
def test_blocks_that_write_into_their_inputs_are_cached_like_others(network: nn.Module, index: int) -> None:
    with attach(network, FirstBlockCache(0.3)) as plain:
        expected = list(denoise_flux(network, steps=8))
    write_in_place([*network.transformer_blocks, *network.single_transformer_blocks][index])
    with attach(network, FirstBlockCache(0.3)) as report:
        result = list(denoise_flux(network, steps=8))
    assert report.decisions == plain.decisions
    assert 0 < report.reused < 7
    assert [torch.equal(a, b) for a, b in zip(result, expected, strict=True)] == [True] * 8


def test_calls_with_controlnet_samples_compute_and_say_so(network: nn.Module) -> None:
    control = {"controlnet_block_samples": [torch.full((1, 64, 32), 0.1 * i) for i in range(3)]}
    expected = predict(network, latents(0), **control)
    with attach(network, FirstBlockCache(1.0)) as report:
        predict(network, latents(0))
        assert torch.equal(predict(network, latents(0), **control), expected)
        predict(network, latents(0))
    assert report.decisions == "CCC"
    assert "controlnet_block_samples" in report.warnings[0]


def test_another_family_is_another_view() -> None:
    """SD3: a single list of joint blocks, the last of which returns no text stream."""
    network = sd3.build()
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500, 500]),
        **sd3.conditioning(2),
    }
    moved = inputs | {"hidden_states": torch.stack([inputs["hidden_states"][0], torch.randn(4, 16, 16)])}
    expected = [network(**inputs).sample, network(**moved).sample]
    with attach(network, FirstBlockCache(0.05)) as report:
        assert torch.equal(network(**inputs).sample, expected[0])
        # Item 0 reuses what it computed, item 1 computes: both are right, to the rounding of another batch size.
        torch.testing.assert_close(network(**moved).sample, expected[1], rtol=1e-4, atol=1e-5)
        network(**moved)
    assert report.item_decisions == ["CRR", "CCR"]


def test_a_plain_torch_network_is_cached_and_only_its_prediction_is_missing() -> None:
    torch.manual_seed(0)
    network = Plain()
    first, condition = torch.randn(2, 5, 8), torch.randn(2, 8)
    second = torch.stack([first[0], first[1] + 1])  # item 0 stands still, item 1 jumps
    expected = [network(first, condition), network(second, condition)]
    with attach(network, FirstBlockCache(0.01)) as report:
        assert torch.equal(network(first, condition), expected[0])
        torch.testing.assert_close(network(second, condition), expected[1], rtol=1e-5, atol=1e-6)
        network(second, condition)
    assert report.item_decisions == ["CRR", "CCR"]
    assert report.reuse_cost is None
    assert report.predicted_speedup is None


def test_lists_that_are_not_there_are_refused(network: nn.Module) -> None:
    with pytest.raises(IncompatibleDenoiser, match="name its lists"):
        TransformerDenoiser(network, block_lists=("joint_blocks",))


def test_a_single_block_has_nothing_to_skip() -> None:
    network = tiny_flux()
    network.transformer_blocks = network.transformer_blocks[:1]
    network.single_transformer_blocks = nn.ModuleList()
    expected = predict(network, latents(1))
    with attach(network, FirstBlockCache(1.0)) as report:
        predict(network, latents(0))
        assert torch.equal(predict(network, latents(1)), expected)
    assert "single block" in report.warnings[0]
