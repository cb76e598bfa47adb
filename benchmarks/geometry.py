"""Networks of known models' shapes with random weights, and the loops that their pipelines run over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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


@dataclass
class Host(ABC):
    """What stands for a pipeline: the network in its slot, the scheduler, and the loop over both."""

    geometry: Geometry
    device: str
    dtype: torch.dtype
    scheduler: Any = None
    inputs: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Denoise once from fixed noise."""
        latents: Tensor = self.inputs["latents"]
        self.scheduler.set_timesteps(self.geometry.steps, device=self.device)
        for timestep in self.scheduler.timesteps:
            latents = self.scheduler.step(self.predict(latents, timestep), timestep, latents, return_dict=False)[0]

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The network's answer at `latents`, guidance included."""


class UNetHost(Host):
    """Both halves of guidance in one batch, as the Stable Diffusion pipelines do."""

    def __init__(self, geometry: Geometry, device: str, dtype: torch.dtype) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel

        super().__init__(geometry, device, dtype, DDIMScheduler(clip_sample=False))
        self.unet = _random(UNet2DConditionModel, geometry.config, device, dtype)
        config: Any = self.unet.config
        height, width = geometry.height // 8, geometry.width // 8
        self.inputs["latents"] = torch.randn(1, config.in_channels, height, width, device=device, dtype=dtype)
        text = torch.randn(2, geometry.text_tokens, config.cross_attention_dim, device=device, dtype=dtype)
        self.conditioning: dict[str, Any] = {"encoder_hidden_states": text}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            self.conditioning["added_cond_kwargs"] = {
                "text_embeds": torch.randn(2, pooled, device=device, dtype=dtype),
                "time_ids": torch.zeros(2, 6, device=device, dtype=dtype),
            }

    def predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        both = self.unet(torch.cat([latents] * 2), timestep, **self.conditioning, return_dict=False)[0]
        without, with_text = both.chunk(2)
        noise: Tensor = without + 7.5 * (with_text - without)
        return noise


class TransformerHost(Host):
    """Packed latents (1, tokens, channels), distilled guidance, one call a step, as the Flux pipeline does."""

    def __init__(self, geometry: Geometry, device: str, dtype: torch.dtype) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

        super().__init__(geometry, device, dtype, FlowMatchEulerDiscreteScheduler())
        self.transformer = _random(FluxTransformer2DModel, geometry.config, device, dtype)
        config: Any = self.transformer.config
        height, width = geometry.height // 16, geometry.width // 16
        ids = torch.zeros(height, width, 3, device=device)
        ids[..., 1] += torch.arange(height, device=device)[:, None]
        ids[..., 2] += torch.arange(width, device=device)[None]
        tokens = geometry.text_tokens
        self.inputs["latents"] = torch.randn(1, height * width, config.in_channels, device=device, dtype=dtype)
        self.conditioning: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(1, tokens, config.joint_attention_dim, device=device, dtype=dtype),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
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


def _random(kind: Any, config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A network with the library's own initialisation, made where it will run."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network: nn.Module = kind(**config)
    finally:
        torch.set_default_dtype(default)
    return network.eval().requires_grad_(False)
