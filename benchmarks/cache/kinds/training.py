"""How the small models were made: python -m benchmarks.cache.kinds.training NAME …

Minutes each on one processor. The pictures are drawn anew, by the recipe's renderer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.cache.kinds.networks import KINDS, LEVELS, SIZE, Kind, PixelTransformer, said
from models.embedded.recipe.grammar import TRAINED
from models.embedded.recipe.renderer import render
from models.embedded.recipe.training import train

PICTURES = 2700
BATCH = 32
STEPS = 1500
UNSAID = 0.1  # of the pictures, trained without words
SHARPER = 2  # renders at so many times the size


def pictures() -> tuple[Tensor, Tensor]:
    """(pictures, 3, height, width) from -1 to 1, and their words."""
    triples = [TRAINED[n % len(TRAINED)] for n in range(PICTURES)]
    drawn = [render(triple, n, SHARPER * SIZE, SHARPER * SIZE) for n, triple in enumerate(triples)]
    small = [np.asarray(Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BOX)) for one in drawn]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1, said(triples)


def made(kind: Kind, folder: Path) -> nn.Module:
    """The trained network; a checkpoint in `folder` is gone on from."""
    torch.manual_seed(0)
    network = kind.build()
    shown, words = pictures()
    levels = DDIMScheduler(**LEVELS).alphas_cumprod

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(shown), (BATCH,), generator=generator)
        x0, noise = shown[chosen], torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
        told = words[chosen] * (torch.rand(BATCH, 1, 1, generator=generator) > UNSAID)
        if isinstance(network, PixelTransformer):
            time = torch.sigmoid(torch.randn(BATCH, generator=generator))
            share = time.view(-1, 1, 1, 1)
            x, wanted = (1 - share) * x0 + share * noise, noise - x0
            found = network(x, time, told)[0]
            return (found - wanted).square().mean()
        timestep = torch.randint(len(levels), (BATCH,), generator=generator)
        alpha, sigma = (square[timestep].sqrt().view(-1, 1, 1, 1) for square in (levels, 1 - levels))
        x = alpha * x0 + sigma * noise
        wanted = alpha * noise - sigma * x0 if kind.prediction == "v_prediction" else noise
        given = {} if kind.guidance is None else {"encoder_hidden_states": told}
        return (network(x, timestep, **given).sample - wanted).square().mean()

    return train(kind.name, folder, network, loss_of, steps=STEPS, learning_rate=3e-3)


def main(names: list[str], folder: Path = Path("out/kinds")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or KINDS:
        network = made(KINDS[name], folder)
        save_file({key: value.half().contiguous() for key, value in network.state_dict().items()}, KINDS[name].weights)


if __name__ == "__main__":
    main(sys.argv[1:])
