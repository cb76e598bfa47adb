"""AuraFlow: joint blocks, then blocks over text and image in one tensor; images go in as they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from cache import TransformerDenoiser

LISTS = ("joint_transformer_blocks", "single_transformer_blocks")


def build() -> nn.Module:
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


def view(network: nn.Module) -> TransformerDenoiser:
    return TransformerDenoiser(network, block_lists=LISTS)


def steps(network: nn.Module, *, seed: int = 0, steps: int = 6, size: tuple[int, int] = (8, 8)) -> Iterator[Tensor]:
    """Flow-matching Euler; the latents (1, 4, height, width) after each step. The network is told times
    near each other: random gates without biases would turn with them, and no call be like the one before."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed))
    text = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        velocity = network(latents, text, timestep[None] / 100_000, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        yield latents
