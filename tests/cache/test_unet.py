"""The UNet's view and the branch pass: which layers run, and the calls that are not plain."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from cache import DeepCache, FirstBlockCache, IncompatibleDenoiser, UNetDenoiser, attach, view_of
from tests.cache.cut import Cut
from tests.cache.networks import conditioning, denoise_unet, tiny_flux, tiny_sd, tiny_sdxl, tiny_unconditional

ALL = [tiny_sd, tiny_sdxl, tiny_unconditional]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def arguments(network: nn.Module, size: tuple[int, int] = (16, 16), items: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(items, network.config.in_channels, *size, generator=generator)
    return {"sample": sample, "timestep": torch.tensor(500 - seed), **conditioning(network, items)}


def layers_of(network: nn.Module) -> dict[str, list[int]]:
    """The layers in the blocks and around them; the lists grow by one entry with each of their calls."""
    ran: dict[str, list[int]] = {}
    for path, module in network.named_modules():
        inside = path.split(".")[-2] if "." in path else ""
        if inside in {"resnets", "attentions", "downsamplers", "upsamplers"} or path in {"conv_in", "conv_out"}:
            ran[path] = []
            module.register_forward_hook(lambda *_, calls=ran[path]: calls.append(1))
    network.mid_block.register_forward_hook(lambda *_: ran.setdefault("mid_block", []).append(1))
    return ran


# Written by hand for four levels of two layers: what the branch adds to the one before it.
DOWN = [
    {"conv_in"},
    {"down_blocks.0.resnets.0", "down_blocks.0.attentions.0"},
    {"down_blocks.0.resnets.1", "down_blocks.0.attentions.1"},
    {"down_blocks.0.downsamplers.0"},
    {"down_blocks.1.resnets.0", "down_blocks.1.attentions.0"},
]
UP = [
    {"up_blocks.3.resnets.2", "up_blocks.3.attentions.2", "conv_out"},
    {"up_blocks.3.resnets.1", "up_blocks.3.attentions.1"},
    {"up_blocks.3.resnets.0", "up_blocks.3.attentions.0"},
    {"up_blocks.2.resnets.2", "up_blocks.2.attentions.2", "up_blocks.2.upsamplers.0"},
    {"up_blocks.2.resnets.1", "up_blocks.2.attentions.1"},
]


@pytest.mark.parametrize("branch", range(5))
def test_a_reuse_call_runs_the_branchs_layers_and_no_other(branch: int) -> None:
    network = tiny_sd()
    ran = layers_of(network)
    expected = set().union(*DOWN[: branch + 1], *UP[: branch + 1])
    with DeepCache(2, 0).attach(Cut(network, branch)):
        network(**arguments(network))
        assert {path for path, calls in ran.items() if len(calls) != 1} == set()
        network(**arguments(network, seed=1))
    assert {path for path, calls in ran.items() if len(calls) == 2} == expected


@pytest.mark.parametrize("build", ALL)
def test_reusing_for_the_same_input_gives_the_computed_answer(build: Any) -> None:
    """For every branch: what is kept and what is run make up the whole network, whatever its levels and layers."""
    network = build()
    call = arguments(network)
    expected = network(**call).sample
    for branch in [None, *range(view_of(network).branches)]:  # type: ignore[attr-defined]
        with DeepCache(2, 0).attach(Cut(network, branch)) as report:
            network(**call)
            assert torch.equal(network(**call).sample, expected)
        assert report.decisions == "CR"
        assert report.settings["branch"] == branch


@pytest.mark.parametrize("branch", [0, 4, 7, 11])
def test_sizes_that_do_not_divide_are_upsampled_to_their_skips(branch: int) -> None:
    network = tiny_sd()
    call = arguments(network, size=(18, 23))
    expected = network(**call).sample
    with DeepCache(2, 0).attach(Cut(network, branch)) as report:
        network(**call)
        assert torch.equal(network(**call).sample, expected)
    assert report.decisions == "CR"


@pytest.mark.parametrize("branch", [None, 1])
@pytest.mark.parametrize("return_dict", [True, False])
def test_answers_keep_their_form(branch: int | None, return_dict: bool) -> None:
    network = tiny_sd()
    call = arguments(network) | {"return_dict": return_dict}
    with DeepCache(2, 0).attach(Cut(network, branch)):
        computed, reused = network(**call), network(**call)
    assert type(reused) is type(computed)
    assert torch.equal(reused[0], computed[0])


def test_a_kept_prediction_is_out_of_its_callers_reach() -> None:
    network = tiny_sd()
    call = arguments(network)
    expected = network(**call).sample
    with DeepCache(4, 0).attach(Cut(network, None)):
        for _ in range(3):
            prediction = network(**call).sample
            assert torch.equal(prediction, expected)
            prediction.mul_(-1)


@pytest.mark.parametrize(
    "extra",
    [
        {"timestep_cond": torch.full((2, 8), 0.3)},
        {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7])},
        {"class_labels": torch.tensor([1, 2])},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_every_condition_acts_on_reuse_calls(extra: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        time_cond_proj_dim=8,
        num_class_embeds=4,
    ).eval()
    call = arguments(network) | {"class_labels": torch.tensor([0, 0])} | extra
    expected = network(**call).sample
    with DeepCache(2, 0).attach(Cut(network, 2)):
        network(**call)
        reused = network(**call).sample
    assert torch.equal(reused, expected)
    # One that goes through the shallow layers alone is felt there: the kept state is that of another value.
    other = {name: value.roll(1, 0) if value.dtype == torch.long else value * 2 for name, value in extra.items()}
    with DeepCache(2, 0).attach(Cut(network, 2)) as report:
        network(**call)
        changed = network(**(call | other)).sample
    assert report.decisions == "CR"
    assert not torch.equal(changed, expected)


def test_positional_arguments_are_understood() -> None:
    network = tiny_sd()
    call = arguments(network)
    values = [call["sample"], call["timestep"], call["encoder_hidden_states"]]
    with attach(network, DeepCache(2, 0, start=400, end=600)) as report:
        network(*values)
        network(*values)
        network(values[0], torch.tensor(100), values[2])
    assert report.decisions == "CRC"


def test_calls_with_controlnet_residuals_compute_and_say_so() -> None:
    network = tiny_sd()
    call = arguments(network)
    entries = [(32, 16), (32, 16), (32, 16), (32, 8), (32, 8), (32, 8), (32, 4), (64, 4), (64, 4), (64, 2)] + 2 * [
        (64, 2)
    ]
    control = {
        "down_block_additional_residuals": [torch.full((2, c, s, s), 0.1) for c, s in entries],
        "mid_block_additional_residual": torch.full((2, 64, 2, 2), 0.1),
    }
    expected = network(**call, **control).sample
    with attach(network, DeepCache(3, 0)) as report:
        network(**call)
        for _ in range(2):
            assert torch.equal(network(**call, **control).sample, expected)
        network(**call)
        network(**call)
    assert report.decisions == "CCCCR"
    assert "down_block_additional_residuals" in report.warnings[0]


def test_freeu_does_not_act_twice_on_what_is_kept() -> None:
    """FreeU scales an up block's input in place (its first two levels)."""
    network = tiny_sd()
    network.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    call = arguments(network)
    expected = network(**call).sample
    with DeepCache(4, 0).attach(Cut(network, 9)) as report:
        network(**call)
        for _ in range(3):
            assert torch.equal(network(**call).sample, expected)
    assert report.decisions == "CRRR"


def test_a_layer_that_does_not_report_is_said_and_nothing_breaks() -> None:
    """As in a block that was compiled whole: the layer runs without its hooks."""
    network = tiny_sd()
    call = arguments(network)
    expected = network(**call).sample
    block = network.up_blocks[3]
    with DeepCache(2, 0).attach(Cut(network, 1)) as report:
        block.__dict__["attentions"] = [attention.forward for attention in block.attentions]
        assert all(torch.equal(network(**call).sample, expected) for _ in range(3))
    assert report.decisions == "CCC"
    assert "compiled into a larger block" in report.warnings[0]


def test_conditional_and_unconditional_calls_apart_keep_their_own() -> None:
    network = tiny_sd()
    states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4))
    calls = {
        name: arguments(network, items=1) | {"encoder_hidden_states": s[None]}
        for name, s in zip("ab", states, strict=True)
    }
    expected = {name: network(**call).sample for name, call in calls.items()}
    with DeepCache(2, 0).attach(Cut(network, 1)) as report:
        for _ in range(2):
            for name, call in calls.items():
                with network.cache_context(name):
                    assert torch.equal(network(**call).sample, expected[name])
    assert report.decisions == "CCRR"


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def test_offload_hooks_run_on_reuse_calls_and_stay() -> None:
    network = tiny_sd()
    call = arguments(network)
    around, inside, deep = Counting(), Counting(), Counting()
    add_hook_to_module(network, around)
    add_hook_to_module(network.conv_in, inside)
    add_hook_to_module(network.mid_block, deep)
    hooked = network.forward
    with attach(network, DeepCache(3, 0)) as report:
        for _ in range(3):
            network(**call)
    assert report.decisions == "CRR"
    assert (around.calls, inside.calls, deep.calls) == (3, 3, 1)
    assert network.forward is hooked


def test_a_pipeline_is_enough() -> None:
    network = tiny_unconditional()
    pipe = SimpleNamespace(unet=network, scheduler=SimpleNamespace(config=SimpleNamespace(num_train_timesteps=500)))
    view = view_of(pipe)
    assert isinstance(view, UNetDenoiser)
    assert (view.root, view.num_train_timesteps) == (network, 500)
    with attach(pipe, DeepCache(2, 0)) as report:
        list(denoise_unet(network, steps=4))
    assert report.decisions == "CRCR"


def test_structures_that_cannot_be_cut_are_refused() -> None:
    skips = UNet2DModel(
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=8,
    )
    with pytest.raises(IncompatibleDenoiser, match="SkipDownBlock2D"):
        view_of(skips)
    with pytest.raises(IncompatibleDenoiser, match="neither a unet nor a transformer"):
        view_of(SimpleNamespace())
    with pytest.raises(IncompatibleDenoiser, match="block_lists"):
        view_of(nn.Linear(2, 2))


def test_each_cache_refuses_the_others_network_with_a_remedy() -> None:
    with pytest.raises(IncompatibleDenoiser, match="use FirstBlockCache"), attach(tiny_flux(), DeepCache()):
        pass
    with pytest.raises(IncompatibleDenoiser, match="use DeepCache"), attach(tiny_unconditional(), FirstBlockCache()):
        pass
