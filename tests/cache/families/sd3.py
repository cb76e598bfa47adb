"""Stable Diffusion 3: one list of joint blocks, the last of which returns no text; images go in as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn


def build() -> nn.Module:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        num_layers=5,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    ).eval()


def conditioning(items: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "encoder_hidden_states": torch.randn(items, 5, 32, generator=generator),
        "pooled_projections": torch.randn(items, 16, generator=generator),
    }


def steps(network: nn.Module, *, seed: int = 0, steps: int = 6, size: tuple[int, int] = (16, 16)) -> Iterator[Tensor]:
    """Flow-matching Euler; the latents (1, 4, height, width) after each step."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed))
    extra = conditioning(1)
    for timestep in scheduler.timesteps:
        velocity = network(latents, timestep=timestep[None], **extra, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        yield latents
