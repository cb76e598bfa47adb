"""Wan: a video transformer of one stream. Its blocks are called by position, read the text and return tokens alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor, nn


def build() -> nn.Module:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=48,
        num_layers=5,
        rope_max_seq_len=32,
    ).eval()


def steps(network: nn.Module, *, seed: int = 0, steps: int = 6, size: tuple[int, int] = (16, 16)) -> Iterator[Tensor]:
    """Flow-matching Euler; the latents (1, 4, 2 frames, height, width) after each step."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 2, *size, generator=torch.Generator().manual_seed(seed))
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        with network.cache_context("cond"):
            velocity = network(latents, timestep[None], text, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        yield latents
