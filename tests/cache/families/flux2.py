"""FLUX.2: double-stream blocks, then single-stream ones over text and image in one tensor; modulation is shared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor, nn

LISTS = ("transformer_blocks", "single_transformer_blocks")


def build() -> nn.Module:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()


def inputs(items: int, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    text = torch.randn(items, 5, 32, generator=torch.Generator().manual_seed(1))
    return {
        "encoder_hidden_states": text,
        "txt_ids": Flux2KleinPipeline._prepare_text_ids(text),
        "img_ids": Flux2KleinPipeline._prepare_latent_ids(torch.empty(items, 1, *size)),
    }


def steps(network: nn.Module, *, seed: int = 0, steps: int = 6, size: tuple[int, int] = (8, 8)) -> Iterator[Tensor]:
    """Flow-matching Euler; the latents (1, tokens, 16) after each step. The network is told times
    near each other: random gates without biases would turn with them, and no call be like the one before."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, size[0] * size[1], 16, generator=torch.Generator().manual_seed(seed))
    extra = inputs(1, size)
    for timestep in scheduler.timesteps:
        velocity = network(latents, timestep=timestep[None] / 100_000, **extra, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        yield latents
