"""Autoencoders of pictures, and of videos, of which a picture is one frame: diffusers' classes differ in their words.

Latents are (batch, channels, height, width), pixels (batch, 3, height, width), -1 … 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def has_frames(vae: Any) -> bool:
    """Whether it is one of videos."""
    return "z_dim" in vae.config


def channels(vae: Any) -> int:
    """Of its latents."""
    return int(vae.config.z_dim if has_frames(vae) else vae.config.latent_channels)


def tile(vae: Any) -> int:
    """Pixels of a side of its tiles."""
    return int(vae.tile_sample_min_height if has_frames(vae) else vae.tile_sample_min_size)


def decoded(vae: Any, latents: Tensor) -> Tensor:
    pixels: Tensor = vae.decode(latents.unsqueeze(2) if has_frames(vae) else latents, return_dict=False)[0]
    return pixels.squeeze(2) if has_frames(vae) else pixels


def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """The likeliest latents."""
    mode: Tensor = vae.encode(pixels.unsqueeze(2) if has_frames(vae) else pixels).latent_dist.mode()
    return mode.squeeze(2) if has_frames(vae) else mode
