"""tiny-sd's denoiser: a Stable Diffusion UNet of four levels with two layers each, v-prediction to almost no signal.

The noise schedule is scaled-linear, shifted so that the last step keeps 1 % of the signal's amplitude (Lin et al.
2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.1, which goes to zero; 1 % keeps every
sampler's sigmas finite). Without it noon came out as sunset: these pictures are mostly low-frequency colour.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from models.embedded.recipe import text
from models.embedded.recipe.autoencoder import LATENT_CHANNELS
from models.embedded.recipe.latents import Latents
from models.embedded.recipe.training import DEVICE, autocast, train

TRAIN_STEPS = 1000
TERMINAL_SIGNAL = 0.01


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=(16, 24),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 96, 96),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text.WIDTH,
        attention_head_dim=(2, 3, 3, 3),  # read by diffusers as the numbers of heads, as in SD's own configurations
        norm_num_groups=16,
    ).to(DEVICE, memory_format=torch.channels_last)


def betas() -> Tensor:
    """(TRAIN_STEPS,) of the shifted scaled-linear schedule."""
    plain = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    signal = (1 - plain).cumprod(0).sqrt()
    signal = TERMINAL_SIGNAL + (signal - signal[-1]) * (signal[0] - TERMINAL_SIGNAL) / (signal[0] - signal[-1])
    alphas = signal**2
    return 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])


def run(
    folder: Path, encoder: nn.Module, steps: int, batch: int = 24, learning_rate: float = 4e-3
) -> UNet2DConditionModel:
    torch.manual_seed(0)
    model, latents, tokenizer = build(), Latents(folder), text.clip_tokenizer()
    print(f"unet: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    if DEVICE == "cpu":  # a fifth faster than the fused attention, whose backward is slow here
        model.set_attn_processor(AttnProcessor())
    alphas = (1 - betas()).cumprod(0).float().to(DEVICE)

    def loss_of(step: int) -> Tensor:
        dealt = latents.deal(step, batch)
        rng = torch.Generator().manual_seed(step)
        # Evenly spread over the schedule within a batch: less variance than independent draws.
        times = (torch.rand(1, generator=rng) + torch.arange(batch) / batch) % 1
        times = (times * TRAIN_STEPS).long().to(DEVICE)
        noise = torch.randn(dealt.latents.shape, generator=rng).to(DEVICE)
        signal, sigma = alphas[times].sqrt().view(-1, 1, 1, 1), (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
        noisy = signal * dealt.latents + sigma * noise
        target = signal * noise - sigma * dealt.latents
        with torch.no_grad():
            said = encoder(text.tokens(tokenizer, dealt.captions)).last_hidden_state
        with autocast():
            made = model(noisy.contiguous(memory_format=torch.channels_last), times, said).sample
        return F.mse_loss(made.float(), target)

    train("unet", folder, model, loss_of, steps=steps, learning_rate=learning_rate)
    return model
