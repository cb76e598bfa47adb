"""A small UNet on pixels with the cosine schedule, trained for this benchmark on our renderer's landscapes.

Nothing of it is served. It is unlike `tiny-sd` in what matters to a placement: no autoencoder, no prompt, no guidance,
and the cosine schedule (Nichol and Dhariwal 2021) begins in pure noise, where features change most from call to call.
`python -m benchmarks.placement.pixel` makes its weights again, in a quarter of an hour on one core.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.embedded.recipe.grammar import TRIPLES
from models.embedded.recipe.renderer import render
from models.embedded.recipe.training import DEVICE, autocast, averaged, train

WEIGHTS = Path(__file__).parent / "pixel.safetensors"
SIZE = 32  # pixels a side
PICTURES = 12_000
STEPS = 2400
BATCH = 32


def build() -> UNet2DModel:
    down, up = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    shape = {"sample_size": SIZE, "block_out_channels": (16, 32, 64), "layers_per_block": 2}
    return UNet2DModel(down_block_types=down, up_block_types=up, attention_head_dim=16, norm_num_groups=8, **shape)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2")


def load() -> DDIMPipeline:
    """The trained network with its scheduler, float32, on the CPU."""
    unet = build()
    unet.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    pipeline = DDIMPipeline(unet.eval().requires_grad_(False), scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(work: Path = Path("out/pixel")) -> None:
    """Train (resuming from `work`'s checkpoint) and write the weights."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    unet = build().to(DEVICE)
    scenes = [render(TRIPLES[i % len(TRIPLES)], 500_000_000 + i, SIZE, SIZE) for i in range(PICTURES)]  # equally often
    pictures = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2) / 127.5 - 1  # (n, 3, SIZE, SIZE) in -1 … 1
    alphas = scheduler().alphas_cumprod.to(DEVICE)
    typer.echo(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, {len(pictures)} pictures")

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(step)
        clean = pictures[Random(step).choices(range(len(pictures)), k=BATCH)].to(DEVICE)
        times = (torch.rand(1, generator=rng) + torch.arange(BATCH) / BATCH) % 1  # spread evenly within the batch
        times = (times * len(alphas)).long().to(DEVICE)
        noise = torch.randn(clean.shape, generator=rng).to(DEVICE)
        kept = alphas[times].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        with autocast():
            made = unet(noisy, times).sample
        return F.mse_loss(made.float(), noise)

    train("pixel", work, unet, loss_of, steps=STEPS, learning_rate=4e-3)
    unet = averaged("pixel", work, build().to(DEVICE))
    save_file({name: tensor.half().cpu().contiguous() for name, tensor in unet.state_dict().items()}, WEIGHTS)


if __name__ == "__main__":
    typer.run(main)
