"""Layouts of checkpoints: a family's networks, by component, under the names that a file has them by.

Each is a function of the networks, so that it names what is to be written, what was loaded from it, and what is only
an outline in the published size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tests.models import original
from tests.models.original import Tensors

Layout = Callable[[Any], Tensors]
UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."
NORM = "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # spread wider in SD2's that predict velocities
INPUT = f"{UNET}input_blocks.0.0.weight"


def holding(shapes: Mapping[str, tuple[int, ...]], layout: Layout | None = None) -> Layout:
    """Zeros of these shapes, and what another layout has."""
    return lambda made: (
        ({} if layout is None else layout(made)) | {name: torch.zeros(shape) for name, shape in shapes.items()}
    )


def without(layout: Layout, beginning: str) -> Layout:
    return lambda made: {name: value for name, value in layout(made).items() if not name.startswith(beginning)}


def renamed(layout: Layout, *pairs: tuple[str, str]) -> Layout:
    """With each beginning of a name replaced by another."""

    def name(old: str) -> str:
        return next((new + old.removeprefix(was) for was, new in pairs if old.startswith(was)), old)

    return lambda made: {name(key): value for key, value in layout(made).items()}


def only(layout: Layout, prefix: str) -> Layout:
    """What is under the prefix, without it."""
    return lambda made: {
        name.removeprefix(prefix): value for name, value in layout(made).items() if name.startswith(prefix)
    }


def joined(parts: Mapping[str, Tensors]) -> Tensors:
    return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}


def with_ema(made: Any) -> Tensors:
    """Averages of the weights as CompVis names them, in other numbers."""
    tensors = original.stable_diffusion(made)
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): torch.zeros_like(value)
        for name, value in tensors.items()
        if name.startswith(UNET)
    }
    return tensors | averages | {"model_ema.decay": torch.zeros(()), "model_ema.num_updates": torch.zeros(())}


_LEFT = {
    "betas": (1000,),
    "alphas_cumprod": (1000,),
    "sqrt_alphas_cumprod": (1000,),
    "log_one_minus_alphas_cumprod": (1000,),
    "posterior_variance": (1000,),
    "logvar": (1000,),
    "global_step": (),
    "first_stage_model.loss.logvar": (),
    "first_stage_model.loss.discriminator.main.0.weight": (64, 3, 4, 4),
    "cond_stage_model.logit_scale": (),
}


def with_leftovers(made: Any) -> Tensors:
    """What a training run, a merger and an old transformers left."""
    positions = {f"{TEXT}embeddings.position_ids": torch.arange(77)[None]}
    return holding(_LEFT, original.stable_diffusion)(made) | positions


def with_last_layer(made: Any) -> Tensors:
    """SD2's text encoder as published: OpenCLIP's last layer and projection, which nothing reads."""
    tensors = original.stable_diffusion(made)
    last = {name.replace(".22.", ".23."): value for name, value in tensors.items() if ".resblocks.22." in name}
    width = made.text_encoder.config.hidden_size
    unread = {"text_projection": (width, width), "logit_scale": ()}
    return tensors | last | holding({f"cond_stage_model.model.{name}": shape for name, shape in unread.items()})(made)


def velocity(made: Any) -> Tensors:
    tensors = original.stable_diffusion(made)
    return tensors | {UNET + NORM: torch.linspace(-0.3, 0.3, len(tensors[UNET + NORM])).half().float()}


def flux(made: Any) -> Tensors:
    return original.flux(made.transformer)


def flux_of_diffusers(made: Any) -> Tensors:
    state: Tensors = made.transformer.state_dict()
    return state


def clip_l(made: Any) -> Tensors:
    return original.clip(made.text_encoder)


def whole_clip(made: Any) -> Tensors:
    """With its vision tower, which is the deeper one."""
    seen = {"vision_model.encoder.layers.23.self_attn.q_proj.weight": (64, 64), "visual_projection.weight": (48, 64)}
    return holding({**seen, "text_projection.weight": (48, 48), "logit_scale": ()}, clip_l)(made)


def whole_open_clip(made: Any) -> Tensors:
    """OpenCLIP's whole file, of which the vision tower has 32 layers."""
    seen = {"visual.conv1.weight": (1280, 3, 14, 14), "visual.transformer.resblocks.31.ln_1.weight": (1280,)}
    return holding(seen, lambda made: original.open_clip(made.text_encoder))(made)


def t5(made: Any) -> Tensors:
    """Its words under both names, as some write them."""
    state: Tensors = made.text_encoder_2.state_dict()
    return state


def autoencoder(made: Any) -> Tensors:
    return original.autoencoder(made.vae)


def sdxl_of_comfyui(made: Any) -> Tensors:
    parts = {
        "diffusion_model.": only(original.stable_diffusion, UNET)(made),
        "vae.": autoencoder(made),
        "text_encoders.clip_l.transformer.": clip_l(made),
        "text_encoders.clip_g.transformer.": original.clip(made.text_encoder_2),
    }
    return joined(parts)


def in_folders(made: Any) -> Tensors:
    """diffusers' own names, each network in a folder."""
    names = ("unet", "vae", "text_encoder")
    return joined({f"{name}/": getattr(made, name).state_dict() for name in names})


def flux_whole(made: Any) -> Tensors:
    """Everything in one file, as ComfyUI saves it: flux1-dev-fp8.safetensors."""
    parts = {
        UNET: flux(made),
        "vae.": autoencoder(made),
        "text_encoders.clip_l.transformer.": clip_l(made),
        "text_encoders.t5xxl.transformer.": t5(made),
    }
    return joined(parts) | {f"text_encoders.{name}.logit_scale": torch.zeros(()) for name in ("clip_l", "t5xxl")}


def widened(channels: int) -> Layout:
    """With a UNet that takes further channels."""

    def layout(made: Any) -> Tensors:
        tensors = original.stable_diffusion(made)
        own = tensors[INPUT]
        return tensors if own.shape[1] == channels else tensors | {INPUT: torch.full((len(own), channels, 3, 3), 0.5)}

    return layout
