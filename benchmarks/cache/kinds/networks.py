"""Small networks of other kinds than the embedded models, and the loop that draws with them.

Each is a kind of its own in what it predicts, what it is built of and how its sampler goes. They draw the recipe's
landscapes on 24 × 24 pixels, after minutes of training (`training.py`), to show whether what was chosen on the embedded
models holds elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cache import CacheReport, CacheStrategy, attach, view_of
from models.embedded.recipe.grammar import PLACES, TIMES, TRIPLES, WEATHERS, Triple

SIZE = 24  # pixels a side
WORDS = (*WEATHERS, *PLACES, *TIMES)
NEAREST = 0.05  # of the noise that a predicted clean sample is divided by in training
WEIGHTS = Path(__file__).parent
LEVELS: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}  # of noise, for diffusion


def said(triples: Sequence[Triple]) -> Tensor:
    """Each scene's three words (scenes, 3, words), one-hot; zeros say nothing."""
    places = [[WORDS.index(word) for word in (one.weather, one.place, one.time)] for one in triples]
    return F.one_hot(torch.tensor(places), len(WORDS)).float()


class Block(nn.Module):
    """Attention and two layers, each scaled and shifted by the time (Peebles and Xie 2022; PixArt's shared table)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.queries = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.table = nn.Parameter(torch.zeros(6, width))

    def forward(self, hidden_states: Tensor, *, condition: Tensor) -> Tensor:
        """hidden_states: (B, N, C). condition: (B, 6, C)."""
        shift, scale, gate, shift2, scale2, gate2 = (condition + self.table)[:, :, None].unbind(1)
        x = hidden_states
        normed = self.norm(x) * (1 + scale) + shift
        q, k, v = self.queries(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.layers(self.norm(x) * (1 + scale2) + shift2)


class PixelTransformer(ModelMixin, ConfigMixin):
    """A transformer on patches of pixels, for flow matching; hands on the velocity ε - x₀.

    clean: whether its last layer is the clean sample, of which follows the velocity (x - x̂₀) / t; as in Li and He 2025,
        "Back to Basics: Let Denoising Generative Models Denoise" (arXiv:2511.13720).
    """

    @register_to_config
    def __init__(self, *, clean: bool, patch: int, width: int, depth: int, inner: int, heads: int = 4) -> None:
        super().__init__()
        self.clean, self.patch, self.width = clean, patch, width
        self.enter = nn.Linear(3 * patch**2, width)
        self.places = nn.Parameter(0.02 * torch.randn((SIZE // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.words = nn.Linear(len(WORDS), width)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.transformer_blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, 3 * patch**2)
        for silent in (self.modulate[1], self.leave):
            nn.init.zeros_(silent.weight)
            nn.init.zeros_(silent.bias)

    def forward(self, hidden_states: Tensor, timestep: Tensor, words: Tensor) -> tuple[Tensor]:
        """hidden_states: (B, 3, H, W). timestep: (B,), 1 is noise. words: (B, 3, words)."""
        tokens = F.pixel_unshuffle(hidden_states, self.patch).flatten(2).transpose(1, 2)  # (B, N, 3 P²)
        time = self.time(get_timestep_embedding(1000 * timestep, self.width, flip_sin_to_cos=True))
        condition = self.modulate(time + self.words(words.sum(1))).unflatten(-1, (6, self.width))
        tokens = self.enter(tokens) + self.places
        for block in self.transformer_blocks:
            tokens = block(tokens, condition=condition)
        out = self.leave(self.norm(tokens)).transpose(1, 2).unflatten(2, (SIZE // self.patch, -1))
        out = F.pixel_shuffle(out, self.patch)
        if not self.clean:
            return (out,)
        noise = timestep.clamp_min(NEAREST if self.training else 0.0).view(-1, 1, 1, 1)
        return ((hidden_states - out) / noise,)


def text_unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=len(WORDS),
        attention_head_dim=2,
        norm_num_groups=8,
    )


def plain_unet() -> nn.Module:
    return UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(16, 16, 24),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


@dataclass(frozen=True)
class Kind:
    """prediction: of the noise schedule that it was trained on, `flow` or one of diffusers' names."""

    name: str
    build: Callable[[], nn.Module]
    prediction: str
    steps: int
    guidance: float | None = 2.0  # None: it takes no words

    @property
    def weights(self) -> Path:
        return WEIGHTS / f"{self.name}.safetensors"

    def load(self) -> nn.Module:
        network = self.build()
        network.load_state_dict({name: value.float() for name, value in load_file(self.weights).items()})
        return network.eval().requires_grad_(False)

    def scheduler(self, sampler: str) -> Any:
        if self.prediction == "flow":
            return FlowMatchEulerDiscreteScheduler()
        given = {**LEVELS, "prediction_type": self.prediction, "timestep_spacing": "trailing"}
        if sampler == "ddim":
            return DDIMScheduler(**given, clip_sample=False)
        return DPMSolverMultistepScheduler(**given)

    @property
    def samplers(self) -> tuple[str, ...]:
        return ("euler",) if self.prediction == "flow" else ("ddim", "dpmpp_2m")


def _transformer(clean: bool) -> nn.Module:
    return PixelTransformer(clean=clean, patch=4, width=56, depth=4, inner=140)


def _deep_transformer() -> nn.Module:
    return PixelTransformer(clean=True, patch=4, width=40, depth=7, inner=128)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("clean-transformer", lambda: _transformer(True), "flow", 28),
        Kind("velocity-transformer", lambda: _transformer(False), "flow", 28),
        Kind("deep-clean-transformer", _deep_transformer, "flow", 28),
        Kind("v-unet", text_unet, "v_prediction", 20),
        Kind("unconditional-unet", plain_unet, "epsilon", 20, guidance=None),
    )
}


@torch.inference_mode()
def draw(
    kind: Kind,
    network: nn.Module,
    strategy: CacheStrategy,
    *,
    pictures: int,
    steps: int,
    sampler: str,
    known: bool = True,
) -> tuple[NDArray[np.uint8], CacheReport]:
    """Pictures (pictures, height, width, 3) of seeds 0, 1, …, all in one batch.

    known: whether the cache is told what the sampler makes of a prediction. Without, nothing is corrected.
    """
    scheduler = kind.scheduler(sampler)
    if kind.prediction == "flow":
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())  # as diffusers' Flux pipelines
    else:
        scheduler.set_timesteps(steps)
    x = torch.stack([torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(n)) for n in range(pictures)])
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    guided = kind.guidance is not None
    words = said([TRIPLES[37 * n % len(TRIPLES)] for n in range(pictures)])
    words = torch.cat([torch.zeros_like(words), words])
    name = "transformer" if isinstance(network, PixelTransformer) else "unet"
    host = SimpleNamespace(**{name: network}, scheduler=scheduler, do_classifier_free_guidance=guided)
    view = view_of(host)
    with attach(view if known else view.sampled(lambda: None), strategy) as report:
        for timestep in scheduler.timesteps:
            both = torch.cat([x, x]) if guided else x
            if name == "transformer":
                time = (timestep / scheduler.config.num_train_timesteps).expand(len(both))
                output = network(both, time, words)[0]
            elif guided:
                output = network(both, timestep, encoder_hidden_states=words, return_dict=False)[0]
            else:
                output = network(both, timestep, return_dict=False)[0]
            if guided:
                without, with_text = output.chunk(2)
                output = without + kind.guidance * (with_text - without)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
    found = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return found.permute(0, 2, 3, 1).numpy(), report
