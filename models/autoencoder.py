"""Autoencoders of pictures, and of videos, for which a picture is one frame: diffusers' classes differ in their words.

A grid is latents as a denoiser has them, (batch, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from cache.patching import shadowed
from cache.transfer import upload

SMALL_TILE = 512  # pixels: for a picture that is no larger than the autoencoder's own tile


def has_frames(vae: Any) -> bool:
    """Whether it takes (batch, channels, frames, height, width)."""
    return "z_dim" in vae.config


def channels(vae: Any) -> int:
    """Of its latents."""
    return int(vae.config.z_dim if has_frames(vae) else vae.config.latent_channels)


def unscaled(vae: Any, grid: Tensor) -> Tensor:
    """What it decodes, of a grid in the scale that the denoiser was trained in."""
    config = vae.config
    if not has_frames(vae):
        latents: Tensor = grid / config.scaling_factor
        return latents if config.shift_factor is None else latents + config.shift_factor

    def channelwise(values: list[float]) -> Tensor:
        return upload(torch.tensor(values).view(1, -1, 1, 1, 1).to(grid.dtype), grid.device)

    return grid.unsqueeze(2) / (1.0 / channelwise(config.latents_std)) + channelwise(config.latents_mean)


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Pixels (batch, 3, height, width), -1 … 1."""
    pixels: Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels[:, :, 0] if has_frames(vae) else pixels


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """The likeliest latents of pixels (batch, 3, height, width), in the scale that `decoded` takes."""
    mode: Tensor = vae.encode(pixels.unsqueeze(2) if has_frames(vae) else pixels).latent_dist.mode()
    return mode


def tile(vae: Any, width: int, height: int) -> int:
    """Pixels of a side of the tiles that such a picture is decoded in, should it be."""
    own = _own_tile(vae)
    return own if max(width, height) > own else min(own, SMALL_TILE)


@contextmanager
def tiles(vae: Any, width: int, height: int) -> Iterator[None]:
    """Within the context its tiles are those for such a picture."""
    own, side = _own_tile(vae), tile(vae, width, height)
    if side == own:
        yield
        return
    latents = vae.tile_latent_min_size * side // own
    with shadowed([(vae, "tile_sample_min_size", side), (vae, "tile_latent_min_size", latents)]):
        yield


def _own_tile(vae: Any) -> int:
    return cast("int", vae.tile_sample_min_height if has_frames(vae) else vae.tile_sample_min_size)
