"""Z-Image: items come and go as lists, and each has image and text in one stream, filled up to the batch's longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import Tensor, nn

LISTS = ("layers",)


def build() -> nn.Module:
    torch.manual_seed(0)
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=(4, 6, 6),
        axes_lens=(256, 64, 64),
    ).eval()


def texts(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 16, generator=generator) for length in lengths]


def steps(
    network: nn.Module, *, seed: int = 0, steps: int = 6, size: tuple[int, int] = (8, 8), lengths: Sequence[int] = (5,)
) -> Iterator[Tensor]:
    """Flow-matching Euler; the latents (items, 4, height, width) after each step, an item for each length of text.

    The network is told times near each other: random gates would turn with them, and no call be like the one before.
    """
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(lengths), 4, *size, generator=generator)
    for timestep in scheduler.timesteps:
        time = ((1000 - timestep) / 100_000).expand(len(lengths))
        predictions = network(list(latents[:, :, None].unbind()), time, texts(lengths), return_dict=False)[0]
        latents = scheduler.step(-torch.stack(predictions)[:, :, 0], timestep, latents).prev_sample
        yield latents
