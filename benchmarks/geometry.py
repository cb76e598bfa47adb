"""Networks of known models' shapes with random weights, and the loops that their pipelines run over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """A network's config and the run it is measured in; width and height in pixels, eight a latent."""

    name: str
    kind: str  # "unet" or "transformer"
    config: Mapping[str, Any]
    width: int
    height: int
    steps: int
    text_tokens: int


GEOMETRIES = (
    Geometry("SD1.5 768×512", "unet", SD15, 768, 512, 20, 77),
    Geometry("SDXL 1024×1024", "unet", SDXL, 1024, 1024, 20, 77),
    Geometry("Flux 832×1216", "transformer", FLUX, 832, 1216, 28, 512),
)
_BLOCK = {**FLUX, "num_layers": 1, "num_single_layers": 1}  # the second block is there to be skipped
FLUX_BLOCK = Geometry("Flux's first block, 256×256", "transformer", _BLOCK, 256, 256, 28, 128)
"""What a first-block cache runs of Flux in a reused call, small enough for a CPU."""
TINY = (
    Geometry("tiny UNet", "unet", {
        "sample_size": 8, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "attention_head_dim": 4,
        "cross_attention_dim": 16,
    }, 64, 64, 6, 5),
    Geometry("tiny Flux", "transformer", {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4),
    }, 64, 64, 6, 5),
)  # fmt: skip


class Host:
    """What stands for a pipeline: the network in its slot, the scheduler, and the loop over both.

    A kind of it has `latents` and `predict`, the network's answer at latents and a timestep, guidance included.
    """

    latents: Tensor
    predict: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, geometry: Geometry, device: str, dtype: torch.dtype, kind: Any, scheduler: Any) -> None:
        self.geometry, self.device, self.scheduler = geometry, device, scheduler
        self.made = partial(torch.randn, device=device, dtype=dtype)
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):  # the library's own initialisation, made where it will run
                self.network: Any = kind(**geometry.config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(default)

    def run(self) -> None:
        """Denoise once from fixed noise."""
        latents = self.latents
        self.scheduler.set_timesteps(self.geometry.steps, device=self.device)
        for timestep in self.scheduler.timesteps:
            latents = self.scheduler.step(self.predict(latents, timestep), timestep, latents, return_dict=False)[0]


class UNetHost(Host):
    """Both halves of guidance in one batch, as the Stable Diffusion pipelines do."""

    def __init__(self, geometry: Geometry, device: str, dtype: torch.dtype) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel

        super().__init__(geometry, device, dtype, UNet2DConditionModel, DDIMScheduler(clip_sample=False))
        self.unet, config = self.network, self.network.config
        self.latents = self.made(1, config.in_channels, geometry.height // 8, geometry.width // 8)
        text = self.made(2, geometry.text_tokens, config.cross_attention_dim)
        self.conditioning: dict[str, Any] = {"encoder_hidden_states": text}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {"text_embeds": self.made(2, pooled), "time_ids": torch.zeros(2, 6, device=device, dtype=dtype)}
            self.conditioning["added_cond_kwargs"] = added

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        both = self.unet(torch.cat([latents] * 2), timestep, **self.conditioning, return_dict=False)[0]
        without, with_text = both.chunk(2)
        noise: Tensor = without + 7.5 * (with_text - without)
        return noise


class TransformerHost(Host):
    """Packed latents (1, tokens, channels), distilled guidance, one call a step, as the Flux pipeline does."""

    def __init__(self, geometry: Geometry, device: str, dtype: torch.dtype) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

        super().__init__(geometry, device, dtype, FluxTransformer2DModel, FlowMatchEulerDiscreteScheduler())
        self.transformer, config = self.network, self.network.config
        height, width, tokens = geometry.height // 16, geometry.width // 16, geometry.text_tokens
        ids = torch.zeros(height, width, 3, device=device)
        ids[..., 1] += torch.arange(height, device=device)[:, None]
        ids[..., 2] += torch.arange(width, device=device)[None]
        self.latents = self.made(1, height * width, config.in_channels)
        self.conditioning: dict[str, Any] = {
            "encoder_hidden_states": self.made(1, tokens, config.joint_attention_dim),
            "pooled_projections": self.made(1, config.pooled_projection_dim),
            "img_ids": ids.reshape(-1, 3),
            "txt_ids": torch.zeros(tokens, 3, device=device),
            "guidance": torch.full((1,), 3.5, device=device),
        }

    def arguments(self, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
        """What the network is called with, by name."""
        when = timestep.to(latents.dtype).to(latents.device).expand(1) / 1000
        return {"hidden_states": latents, "timestep": when, **self.conditioning, "return_dict": False}

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        with self.transformer.cache_context("cond"):
            velocity: Tensor = self.transformer(**self.arguments(latents, timestep))[0]
        return velocity
