"""Puts what was trained together as diffusers folders, float16 safetensors, the autoencoder normalised."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
)
from torch import nn

from models.embedded.recipe import autoencoder, flux, latents, text, unet
from models.embedded.recipe.training import averaged

FLUX_SHIFT = 1.5


def write(name: str, folder: Path, work: Path) -> None:
    """Export "tiny-sd" or "tiny-flux" from the checkpoints in `work`."""
    coder = averaged("autoencoder", work, autoencoder.build())
    assert isinstance(coder, AutoencoderKL)
    coder, clip = normalised(coder, work), text.load(work, "clip")
    if name == "tiny-sd":
        tiny_sd(folder, averaged("unet", work, unet.build()), coder, clip)
    else:
        tiny_flux(folder, averaged("flux-distilled", work, flux.build()), coder, clip, text.load(work, "t5"))


def tiny_sd(folder: Path, model: nn.Module, coder: AutoencoderKL, clip: nn.Module) -> None:
    scheduler = DDIMScheduler(
        num_train_timesteps=unet.TRAIN_STEPS,
        trained_betas=[round(beta, 9) for beta in unet.betas().tolist()],
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipeline = StableDiffusionPipeline(
        vae=coder, text_encoder=clip, tokenizer=text.clip_tokenizer(), unet=model, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)


def tiny_flux(folder: Path, model: nn.Module, coder: AutoencoderKL, clip: nn.Module, t5: nn.Module) -> None:
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLUX_SHIFT), vae=coder, text_encoder=clip,
        tokenizer=text.clip_tokenizer(), text_encoder_2=t5, tokenizer_2=text.t5_tokenizer(), transformer=model,
    )  # fmt: skip
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)


def normalised(coder: AutoencoderKL, folder: Path) -> AutoencoderKL:
    """`coder` with the latents' statistics folded in; its shift factor, which Flux asks for, is zero."""
    statistics = latents.Latents(folder)
    latents.normalise(coder, statistics.mean, statistics.deviation)
    coder.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    return coder
