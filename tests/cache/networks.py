"""Small random networks of the true diffusers classes, and plain denoising loops over them.

The loops are the tests' own: a network, a diffusers scheduler, a seeded start. Sizes are read from each network's
config, so that the trained models of `models/embedded/` run through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from cache import Denoiser, UNetDenoiser, view_of
from tests.cache.families import sd3, wan

EMBEDDED = Path(__file__).resolve().parents[2] / "models" / "embedded"


def tiny_sd() -> nn.Module:
    """SD1.5's structure: four levels of two layers, 12 skips."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32, 64, 64),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def tiny_sdxl() -> nn.Module:
    """SDXL's structure: three levels, the first without attention, pooled text and sizes in the time embedding."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    ).eval()


def tiny_unconditional() -> nn.Module:
    """A pixel-space UNet with attention in the middle level; one layer a level, unlike the others."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()


def tiny_flux() -> nn.Module:
    """Flux's structure: 3 double and 7 single blocks."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=7,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return network.eval()


def three_levels() -> nn.Module:
    """One layer a level, text in two of the levels: quick to call, and depth chooses among its branches."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def small_unet() -> nn.Module:
    """Two levels of one layer, for tests that run many calls."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def small_flux() -> nn.Module:
    """One double and two single blocks."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        return hidden_states + 0.1 * self.mix(hidden_states + condition[:, None])


class Plain(nn.Module):
    """Neither diffusers' nor with a config: one stream, its blocks called by position."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(8) for _ in range(3))

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, condition)
        return hidden_states


def conditioning(network: nn.Module, items: int) -> dict[str, Any]:
    """What a UNet is called with beside latents and timestep, seeded by its shape."""
    config = network.config
    if not isinstance(network, UNet2DConditionModel):
        return {}
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(items, 7, config.cross_attention_dim, generator=generator)
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(items, pooled, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(items, 1),
        }
    return inputs


Steps = Iterator[Tensor]  # the latents after each step


def denoise_unet(
    network: nn.Module, *, seed: int = 0, steps: int = 6, size: tuple[int, int] = (16, 16), guidance: float = 3.0
) -> Steps:
    """DDIM; with text, the unconditional and the conditional pass are one batch, as in diffusers' pipelines."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, network.config.in_channels, *size, generator=torch.Generator().manual_seed(seed))
    extra = conditioning(network, 2)
    for timestep in scheduler.timesteps:
        if extra:
            both = network(torch.cat([latents] * 2), timestep, **extra, return_dict=False)[0]
            without, with_text = both.chunk(2)
            noise = without + guidance * (with_text - without)
        else:
            noise = network(latents, timestep).sample
        latents = scheduler.step(noise, timestep, latents).prev_sample
        yield latents


def flux_inputs(network: nn.Module, items: int, size: tuple[int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    height, width = size[0] // 2, size[1] // 2
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    config = network.config
    return {
        "encoder_hidden_states": torch.randn(items, 5, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(items, config.pooled_projection_dim, generator=generator),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((items,), 3.5) if config.guidance_embeds else None,
    }


def denoise_flux(
    network: nn.Module, *, seed: int = 0, steps: int = 6, size: tuple[int, int] = (16, 16), items: int = 1
) -> Steps:
    """Flow-matching Euler on packed latents (items, tokens, channels), in float32; item i starts from seed + i."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    tokens = size[0] * size[1] // 4
    starts = [
        torch.randn(1, tokens, network.config.in_channels, generator=torch.Generator().manual_seed(seed + i))
        for i in range(items)
    ]
    latents = torch.cat(starts)
    dtype = network.x_embedder.weight.dtype
    extra = flux_inputs(network, items, size)
    for name in ("encoder_hidden_states", "pooled_projections"):
        extra[name] = extra[name].to(dtype)
    for timestep in scheduler.timesteps:
        times = timestep.expand(items) / 1000
        with network.cache_context("cond"):
            velocity = network(latents.to(dtype), timestep=times, **extra, return_dict=False)[0]
        latents = scheduler.step(velocity.float(), timestep, latents).prev_sample
        yield latents


@dataclass(frozen=True)
class Family:
    """A network and the loop that belongs to it.

    guided: its loop calls with every picture twice in one batch.
    sampled: the contract suite runs one setting of each strategy on it, which saves time.
    """

    name: str
    build: Callable[[], nn.Module]
    steps: Callable[..., Steps]
    is_unet: bool
    guided: bool = False
    sampled: bool = False

    def view(self, network: nn.Module) -> Denoiser:
        return UNetDenoiser(network, guided=lambda: True) if self.guided else view_of(network)

    @torch.no_grad()
    def denoise(self, network: nn.Module, **settings: Any) -> Tensor:
        """The final latents of one run."""
        *_, last = self.steps(network, **settings)
        return last


FAMILIES = [
    Family("three levels", three_levels, denoise_unet, is_unet=True, guided=True),
    Family("sd", tiny_sd, denoise_unet, is_unet=True, guided=True, sampled=True),
    Family("sdxl", tiny_sdxl, denoise_unet, is_unet=True, guided=True, sampled=True),
    Family("unconditional", tiny_unconditional, denoise_unet, is_unet=True),
    Family("flux", tiny_flux, denoise_flux, is_unet=False),
    Family("sd3", sd3.build, sd3.steps, is_unet=False, sampled=True),
    Family("wan", wan.build, wan.steps, is_unet=False, sampled=True),
]

# The trained models are part of the suite from the day that they are in the repository.
if (EMBEDDED / "tiny-sd").is_dir():
    FAMILIES.append(
        Family(
            "embedded tiny-sd",
            lambda: UNet2DConditionModel.from_pretrained(EMBEDDED / "tiny-sd", subfolder="unet").float().eval(),
            denoise_unet,
            is_unet=True,
            sampled=True,
        )
    )
if (EMBEDDED / "tiny-flux").is_dir():
    FAMILIES.append(
        Family(
            "embedded tiny-flux",
            lambda: (
                FluxTransformer2DModel.from_pretrained(EMBEDDED / "tiny-flux", subfolder="transformer").float().eval()
            ),
            denoise_flux,
            is_unet=False,
            sampled=True,
        )
    )
