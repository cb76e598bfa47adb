"""tiny-flux's denoiser: a Flux transformer of three double and seven single blocks, guidance distilled.

First flow matching with dropped captions at guidance 1, then, as Flux dev was made, distillation: the student learns
the guided velocity v(∅) + g (v(c) − v(∅)) of the first model for random g, told through the guidance embedding, so that
one call a step is enough (Meng et al. 2023, "On Distillation of Guided Diffusion Models", section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from models.embedded.recipe import text
from models.embedded.recipe.autoencoder import LATENT_CHANNELS
from models.embedded.recipe.latents import Batch, Latents
from models.embedded.recipe.training import DEVICE, autocast, train

GUIDANCE = (1.0, 5.0)
SHIFT = 2.0  # of the noise levels in training, towards noise


def build() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=3,
        num_single_layers=7,
        attention_head_dim=56,
        num_attention_heads=3,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 24, 24),
    ).to(DEVICE)


@dataclass(frozen=True, slots=True)
class Noised:
    """A batch at random noise levels: what the transformer is given but for the text and the guidance."""

    hidden_states: Tensor  # (n, tokens, 4 × channels)
    timestep: Tensor  # (n,) in 0…1
    velocity: Tensor  # as hidden_states: noise − latents
    img_ids: Tensor  # (tokens, 3)


def noised(dealt: Batch, step: int) -> Noised:
    count, channels, height, width = dealt.latents.shape
    rng = torch.Generator().manual_seed(step)
    u = (torch.rand(1, generator=rng) + torch.arange(count) / count) % 1
    sigma = (SHIFT * u / (1 + (SHIFT - 1) * u)).to(DEVICE)
    noise = torch.randn(dealt.latents.shape, generator=rng).to(DEVICE)
    mixed = torch.lerp(dealt.latents, noise, sigma.view(-1, 1, 1, 1))

    def pack(x: Tensor) -> Tensor:
        return FluxPipeline._pack_latents(x, count, channels, height, width)

    ids = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, DEVICE, torch.float32)
    return Noised(pack(mixed), sigma, pack(noise - dealt.latents), ids)


class Speaker:
    """Turns captions into what the transformer reads, with the two frozen encoders."""

    def __init__(self, clip: nn.Module, t5: nn.Module) -> None:
        self._clip, self._t5 = clip, t5
        self._clip_tokens, self._t5_tokens = text.clip_tokenizer(), text.t5_tokenizer()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (n, T5_LENGTH, WIDTH), `pooled_projections` (n, WIDTH), `txt_ids`."""
        return {
            "encoder_hidden_states": self._t5(text.tokens(self._t5_tokens, captions)).last_hidden_state,
            "pooled_projections": self._clip(text.tokens(self._clip_tokens, captions)).pooler_output,
            "txt_ids": torch.zeros(text.T5_LENGTH, 3, device=DEVICE),
        }


def _predict(model: nn.Module, at: Noised, said: dict[str, Tensor], guidance: Tensor) -> Tensor:
    with autocast():
        made: Tensor = model(
            hidden_states=at.hidden_states, timestep=at.timestep, img_ids=at.img_ids, guidance=guidance, **said
        ).sample
    return made.float()


def run(
    folder: Path,
    clip: nn.Module,
    t5: nn.Module,
    steps: int,
    distill_steps: int,
    batch: int = 24,
    learning_rate: float = 3e-3,
) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model, latents, speak = build(), Latents(folder), Speaker(clip, t5)
    print(f"flux: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    ones = torch.ones(batch, device=DEVICE)

    def matching(step: int) -> Tensor:
        dealt = latents.deal(step, batch)
        at = noised(dealt, step)
        return F.mse_loss(_predict(model, at, speak(dealt.captions), ones), at.velocity)

    train("flux", folder, model, matching, steps=steps, learning_rate=learning_rate)
    teacher = deepcopy(model).requires_grad_(False)
    train(
        "flux-distilled", folder, model, _distillation(model, teacher, latents, speak, batch),
        steps=distill_steps, learning_rate=0.4 * learning_rate, ema_decay=0.995,
    )  # fmt: skip
    return model


def _distillation(
    model: nn.Module, teacher: nn.Module, latents: Latents, speak: Speaker, batch: int
) -> Callable[[int], Tensor]:
    ones = torch.ones(batch, device=DEVICE)

    def loss_of(step: int) -> Tensor:
        dealt = latents.deal(10_000_000 + step, batch, dropout=0.0)
        at, said = noised(dealt, 10_000_000 + step), speak(dealt.captions)
        rng = torch.Generator().manual_seed(step)
        guidance = (GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(batch, generator=rng)).to(DEVICE)
        with torch.no_grad():
            guided, free = _predict(teacher, at, said, ones), _predict(teacher, at, speak([""] * batch), ones)
            target = free + guidance.view(-1, 1, 1) * (guided - free)
        return F.mse_loss(_predict(model, at, said, guidance), target)

    return loss_of
