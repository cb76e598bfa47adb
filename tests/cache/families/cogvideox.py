"""CogVideoX: joint blocks that return the image stream first, unlike Flux's and SD3's; its view says so."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import CogVideoXTransformer3DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from cache import TransformerDenoiser


def build() -> nn.Module:
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=6,
    ).eval()


def view(network: nn.Module) -> TransformerDenoiser:
    return TransformerDenoiser(network, streams=("hidden_states", "encoder_hidden_states"))


def steps(network: nn.Module, *, seed: int = 0, steps: int = 6) -> Iterator[Tensor]:
    """Flow-matching Euler; the latents (1, 2 frames, 4, 8, 8) after each step."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    text = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        with network.cache_context("cond"):
            velocity = network(latents, text, timestep[None], return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents).prev_sample
        yield latents
