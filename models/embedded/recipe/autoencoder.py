"""The autoencoder of both embedded models: 8 × downsampling to 8 channels, trained on crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from models.embedded.recipe import data
from models.embedded.recipe.training import DEVICE, autocast, train

LATENT_CHANNELS = 8
CROP = 64
LATENT_NOISE = 0.15


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=192,
        scaling_factor=1.0,
    ).to(DEVICE, memory_format=torch.channels_last)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(n, h, w, 3) bytes → (n, 3, h, w) in −1…1, channels last."""
    return torch.tensor(pictures, device=DEVICE).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction_loss(made: Tensor, true: Tensor) -> Tensor:
    """L1 + MSE + the L1 of the image gradients, which is what keeps edges and stars."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(made), gradients(true), strict=True))
    return F.l1_loss(made, true) + F.mse_loss(made, true) + edges


def _disturbed(latents: Tensor) -> Tensor:
    """`latents` with up to LATENT_NOISE of each channel's deviation added: a denoiser's own errors are of that size,
    and an autoencoder that writes fine detail below them decodes them to blotches."""
    amount = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    return latents + amount * latents.detach().std((0, 2, 3), keepdim=True) * torch.randn_like(latents)


def crops(pictures: list[np.ndarray], count: int, rng: np.random.Generator) -> Tensor:
    """(count, 3, CROP, CROP) from random places of random pictures, half of them mirrored."""
    out = np.empty((count, CROP, CROP, 3), np.uint8)
    shares = np.array([len(p) for p in pictures]) / sum(len(p) for p in pictures)
    for i in range(count):
        source = pictures[rng.choice(len(pictures), p=shares)]
        y, x = rng.integers(source.shape[1] - CROP + 1), rng.integers(source.shape[2] - CROP + 1)
        crop = source[rng.integers(len(source)), y : y + CROP, x : x + CROP]
        out[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return to_tensor(out)


def run(folder: Path, steps: int, batch: int = 12, learning_rate: float = 7e-3) -> AutoencoderKL:
    torch.manual_seed(0)
    model = build()
    pictures = [data.load(folder, size)[0] for size in data.SIZES]

    def loss_of(step: int) -> Tensor:
        true = crops(pictures, batch, np.random.default_rng([1, step]))
        with autocast():
            posterior = model.encode(true).latent_dist
            made = model.decode(_disturbed(posterior.sample())).sample
        divergence = posterior.kl().mean() / (CROP * CROP * 3)
        return reconstruction_loss(made.float(), true) + 1e-4 * divergence

    train("autoencoder", folder, model, loss_of, steps=steps, learning_rate=learning_rate, ema_decay=0.998)
    return model
