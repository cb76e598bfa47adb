"""From pictures to what the denoisers are trained on: normalised latents with their triples, all in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.embedded.recipe import data
from models.embedded.recipe.autoencoder import to_tensor
from models.embedded.recipe.grammar import caption
from models.embedded.recipe.training import DEVICE, autocast


@torch.no_grad()
def encode(model: AutoencoderKL, folder: Path) -> None:
    """Write each size's latents, (2 n, channels, h / 8, w / 8) in float16: every picture, then every one mirrored."""
    for size in data.SIZES:
        path = latent_path(folder, size)
        if path.exists():
            continue
        pictures, _ = data.load(folder, size)
        parts = []
        for mirrored in (False, True):
            for i in range(0, len(pictures), 50):
                chunk = pictures[i : i + 50]
                with autocast():
                    posterior = model.encode(to_tensor(np.ascontiguousarray(chunk[:, :, ::-1] if mirrored else chunk)))
                parts.append(posterior.latent_dist.mean.half().cpu())
        torch.save(torch.cat(parts), path)
        print(f"encoded {size[0]}×{size[1]}", flush=True)


def latent_path(folder: Path, size: tuple[int, int]) -> Path:
    return folder / f"latents-{size[0]}x{size[1]}.pt"


@torch.no_grad()
def normalise(model: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Fold "subtract `mean`, divide by `deviation`" of each latent channel, (channels,), into the 1×1 convolutions on
    both sides of the latent, so that a pipeline needs no more than a scaling factor of one."""
    channels = len(mean)
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:channels] /= deviation[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * deviation.log()  # the other half of the outputs is the log variance
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= deviation[None, :, None, None]


@dataclass(frozen=True, slots=True)
class Batch:
    latents: Tensor  # (n, channels, h, w), zero mean and unit deviation a channel
    captions: list[str]


class Latents:
    """The encoded pictures of every size, dealt in batches of one size."""

    def __init__(self, folder: Path) -> None:
        self._parts = [
            (torch.load(latent_path(folder, size), weights_only=True), data.load(folder, size)[1])
            for size in data.SIZES
        ]
        values = torch.cat([part.float().transpose(0, 1).flatten(1) for part, _ in self._parts], 1)
        self.mean, self.deviation = values.mean(1), values.std(1)

    def deal(self, step: int, count: int, dropout: float = 0.1) -> Batch:
        """`count` latents with captions, an empty caption with probability `dropout`."""
        rng = Random(step)
        part, triples = rng.choices(self._parts, weights=list(data.SIZES.values()))[0]
        picks = rng.choices(range(len(part)), k=count)
        chosen = [triples[i % len(triples)] for i in picks]
        said = ["" if rng.random() < dropout else caption(triple, rng) for triple in chosen]
        shape = (1, -1, 1, 1)
        latents = (part[picks].float() - self.mean.view(shape)) / self.deviation.view(shape)
        return Batch(latents.to(DEVICE), said)
