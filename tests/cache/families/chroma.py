"""Chroma: each block has a modulation of its own, the text a mask, and the second list takes both streams as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

TEXT, IMAGE = 5, 16  # tokens


def build() -> nn.Module:
    torch.manual_seed(0)
    return ChromaTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()


def conditioning(items: int) -> dict[str, Any]:
    """Item i has i + 2 words."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(items, TEXT + IMAGE)
    for item in range(items):
        mask[item, item + 2 : TEXT] = 0
    return {
        "encoder_hidden_states": torch.randn(items, TEXT, 32, generator=generator),
        "attention_mask": mask,
        "img_ids": torch.zeros(IMAGE, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def start(items: int, seed: int = 0) -> Tensor:
    return torch.randn(items, IMAGE, 16, generator=torch.Generator().manual_seed(seed))


def steps(network: nn.Module, *, seed: int = 0, steps: int = 6) -> Iterator[Tensor]:
    """Flow-matching Euler; the latents (1, 16 tokens, 16) after each step."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    latents, extra = start(1, seed), conditioning(1)
    for timestep in scheduler.timesteps:
        velocity = network(latents, timestep=timestep[None] / 1000, **extra, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        yield latents
