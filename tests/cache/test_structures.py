"""UNets of many shapes: any level and layer count, resamplers of either kind, with and without text and middle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNetSpatioTemporalConditionModel
from torch import nn

from cache import DeepCache, IncompatibleDenoiser, UNetDenoiser, attach
from cache.flops import deepest_branch
from tests.cache.cut import Cut

TEXT = {"cross_attention_dim": 16, "attention_head_dim": 4, "norm_num_groups": 4}
PLAIN = {"attention_head_dim": 4, "norm_num_groups": 4}

# Class, its config, and how many skips its down path hands across.
STRUCTURES: dict[str, tuple[type[nn.Module], dict[str, Any], int]] = {
    "one level": (
        UNet2DModel,
        {**PLAIN, "block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
        3,
    ),
    "five levels of one layer": (
        UNet2DModel,
        {
            **PLAIN,
            "block_out_channels": (8, 8, 8, 12, 12),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        },
        10,
    ),
    "resampling by residual layers": (
        UNet2DModel,
        {
            **PLAIN,
            "block_out_channels": (8, 12),
            "layers_per_block": 3,
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
        },
        8,
    ),
    "a layer count for each level": (
        UNet2DConditionModel,
        {
            **TEXT,
            "block_out_channels": (8, 8, 16),
            "layers_per_block": (1, 3, 2),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        },
        9,
    ),
    "no middle": (
        UNet2DConditionModel,
        {
            **TEXT,
            "block_out_channels": (8, 8),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "mid_block_type": None,
        },
        6,
    ),
    "simple cross-attention": (
        UNet2DConditionModel,
        {
            **TEXT,
            "block_out_channels": (8, 8),
            "layers_per_block": 1,
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        },
        4,
    ),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(name: str) -> nn.Module:
    kind, config, _ = STRUCTURES[name]
    torch.manual_seed(0)
    return kind(sample_size=16, **config).eval()


def arguments(network: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, network.config.in_channels, *size, generator=generator)
    call: dict[str, Any] = {"sample": sample, "timestep": torch.tensor(500)}
    if isinstance(network, UNet2DConditionModel):
        call["encoder_hidden_states"] = torch.randn(2, 7, 16, generator=generator)
    return call


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_is_kept_and_what_is_run_make_up_the_whole_network(name: str) -> None:
    network = build(name)
    # These cannot upsample to an odd size.
    even = isinstance(network, UNet2DModel) or name == "simple cross-attention"
    for size in ((16, 16), (32, 16) if even else (18, 23)):
        call = arguments(network, size)
        expected = network(**call).sample
        view = Cut(network)
        assert view.branches == STRUCTURES[name][2] - (network.mid_block is None)
        for branch in range(view.branches):
            view.branch = branch
            with DeepCache(2, 0).attach(view) as report:
                assert torch.equal(network(**call).sample, expected)
                assert torch.equal(network(**call).sample, expected)
            assert (report.decisions, report.settings["branch"]) == ("CR", branch)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_greatest_depth_acts_on_every_structure(name: str) -> None:
    """On a shallow UNet no branch is cheap enough at depth 12: the prediction is kept, and the report says so."""
    network = build(name)
    call = arguments(network, (16, 16))
    with attach(network, DeepCache(2, 12)) as report:
        expected = network(**call).sample
        assert network(**call).sample.shape == expected.shape
    branch = deepest_branch(UNetDenoiser(network).branch_costs, 12)
    assert (report.decisions, report.settings["branch"], report.warnings) == ("CR", branch, [])
    assert report.reuse_cost is not None
    assert report.reuse_cost <= 1 / 14
    if name == "one level":
        assert branch is None
        assert report.reuse_cost == 0


def test_a_video_unet_is_one_more_structure() -> None:
    """Its layers mix frames as well, which is their business: it is cut like the others."""
    torch.manual_seed(0)
    network = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=(2, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    call = {
        "sample": torch.randn(1, 2, 8, 8, 8, generator=generator),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(1, 1, 16, generator=generator),
        "added_time_ids": torch.zeros(1, 3),
    }
    expected = network(**call).sample
    view = Cut(network)
    for branch in range(view.branches):
        view.branch = branch
        with DeepCache(2, 0).attach(view) as report:
            network(**call)
            assert torch.equal(network(**call).sample, expected)
        assert report.decisions == "CR"


def test_layers_that_share_one_skip_are_refused() -> None:
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=2,
        down_block_types=("KDownBlock2D", "KDownBlock2D"),
        up_block_types=("KUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=16,
        norm_num_groups=None,
        resnet_time_scale_shift="ada_group",
        time_embedding_type="fourier",
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
    )
    with pytest.raises(IncompatibleDenoiser, match="KUpBlock2D"):
        UNetDenoiser(network)
