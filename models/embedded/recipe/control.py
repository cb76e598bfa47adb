"""tiny-sd-edges: a ControlNet for tiny-sd, which keeps to the edges of a picture (Zhang et al. 2023).

The map is what a request with `edges` gets: OpenCV's Canny of the picture at the size that is drawn. The ControlNet
begins as a copy of the UNet's encoder. Its zero convolutions begin at zero; the last layer of the map's embedding,
which the paper begins at zero as well, does not: the map is seen from the first step, and fewer of them are enough.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from models.control import edges
from models.embedded.recipe import data, text
from models.embedded.recipe.autoencoder import to_tensor
from models.embedded.recipe.grammar import TRAINED, Triple, caption
from models.embedded.recipe.renderer import render
from models.embedded.recipe.training import DEVICE, autocast, train

NAME = "tiny-sd-edges"
PICTURES = 2000
SEED = 90_000_000  # no other training's
DROPOUT = 0.3  # of captions: the map alone has to say what it can


def build(pipeline: StableDiffusionPipeline) -> ControlNetModel:
    embedding = (16, 32, 64, 96)  # channels on the way from the map's pixels to latents
    model = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=embedding)
    torch.nn.init.kaiming_normal_(model.controlnet_cond_embedding.conv_out.weight)
    return model.to(DEVICE, torch.float32, memory_format=torch.channels_last)


class Scenes:
    """Rendered pictures' latents, their edges and what they show, all in memory."""

    @torch.no_grad()
    def __init__(self, pipeline: StableDiffusionPipeline, count: int = PICTURES) -> None:
        rng = Random(0)
        self.parts: list[tuple[Tensor, NDArray[np.uint8], list[Triple]]] = []
        for i, ((width, height), share) in enumerate(data.SIZES.items()):
            triples = [TRAINED[j % len(TRAINED)] for j in range(int(count * share))]
            rng.shuffle(triples)
            latents, maps = [], []
            for j, triple in enumerate(triples):
                picture = render(triple, SEED + 1_000_000 * i + j, width, height)
                with autocast():
                    latents.append(pipeline.vae.encode(to_tensor(picture[None])).latent_dist.mean.half().cpu())
                maps.append(edges(picture))
            self.parts.append((torch.cat(latents), np.stack(maps), triples))

    def deal(self, step: int, count: int) -> tuple[Tensor, Tensor, list[str]]:
        """(n, channels, h, w) latents, (n, 3, 8 h, 8 w) maps of 0 and 1, and captions."""
        rng = Random(step)
        latents, maps, triples = rng.choices(self.parts, weights=list(data.SIZES.values()))[0]
        picks = rng.sample(range(len(triples)), count)
        said = ["" if rng.random() < DROPOUT else caption(triples[i], rng) for i in picks]
        seen = torch.from_numpy(maps[picks]).float()[:, None].expand(-1, 3, -1, -1) / 255
        return latents[picks].float().to(DEVICE), seen.to(DEVICE), said


def run(folder: Path, model_folder: Path, steps: int, batch: int = 8, learning_rate: float = 4e-3) -> ControlNetModel:
    """Train on `model_folder`, the exported tiny-sd, which stays as it is."""
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder, torch_dtype=torch.float32).to(DEVICE)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.requires_grad_(False)
    pipeline.unet.to(memory_format=torch.channels_last)
    model, scenes = build(pipeline), Scenes(pipeline)
    alphas, count = pipeline.scheduler.alphas_cumprod.to(DEVICE), pipeline.scheduler.config.num_train_timesteps
    print(f"control: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    def loss_of(step: int) -> Tensor:
        latents, maps, said = scenes.deal(step, batch)
        rng = torch.Generator().manual_seed(step)
        # Spread over the schedule within a batch, twice as many at its noisy end, where things find their places.
        times = ((torch.rand(1, generator=rng) + torch.arange(batch) / batch) % 1).sqrt()
        times = (times * count).long().clamp(max=count - 1).to(DEVICE)
        noise = torch.randn(latents.shape, generator=rng).to(DEVICE)
        signal, sigma = alphas[times].sqrt().view(-1, 1, 1, 1), (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
        noisy = (signal * latents + sigma * noise).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            read = pipeline.text_encoder(text.tokens(pipeline.tokenizer, said)).last_hidden_state
        with autocast():
            down, middle = model(noisy, times, read, controlnet_cond=maps, return_dict=False)
            made = pipeline.unet(
                noisy, times, read, down_block_additional_residuals=down, mid_block_additional_residual=middle
            ).sample
        return F.mse_loss(made.float(), signal * noise - sigma * latents)

    train("control", folder, model, loss_of, steps=steps, learning_rate=learning_rate, checkpoint_every=100)
    return model
