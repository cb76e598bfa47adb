"""A ControlNet's file, or its folder in diffusers format → the network, if it was made for such a model as this.

What a ControlNet is follows from the shapes of its tensors; what they do not show (heads, groups, activations), from
the network that it was copied from: the model's own.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import finite
from models.base import Control
from models.errors import ControlFailed
from models.libraries import first_line, quiet

from .header import BadFile, read_header
from .recognise import layers

PREFIX = "control_model."  # in the files of the first publication
_WEIGHTS = "diffusion_pytorch_model"
_CLASSES = ("ControlNetModel", "FluxControlNetModel")
_OTHERS = (  # by a part of a tensor's name
    (r"lora_|hada_w|lokr_w|\.lora\.", "a LoRA: put it into the folder of LoRAs"),
    (r"^lllite_", "a ControlLLLite, which is not supported"),
    (r"^difference$", "the difference of a ControlNet from a UNet, which is not supported"),
    (r"controlnet_mode_embedder|control_add_embedding|^task_embedding", "a union of ControlNets, not supported"),
    (r"^double_blocks\.\d", "a ControlNet of Flux in its trainer's names: take it in diffusers' format"),
    (r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\.", "a T2I-Adapter, which is not supported"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter, which is not supported"),
)


@dataclass(frozen=True)
class Found:
    """What lies in a ControlNet's files. shapes: of its tensors by name, in diffusers' names or CompVis's."""

    control: Control
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any] | None

    @property
    def numbers(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @cached_property
    def is_flux(self) -> bool:
        return "controlnet_x_embedder.weight" in self.shapes

    @cached_property
    def is_original(self) -> bool:
        """Whether its names are CompVis's."""
        return f"{PREFIX}input_hint_block.0.weight" in self.shapes or "input_hint_block.0.weight" in self.shapes


def find(control: Control) -> Found:
    """Read from the headers of its files. Raises ControlFailed."""
    name, path, config = control.name, control.path, None
    files: tuple[Path, ...] = (path,)
    try:
        if path.is_dir():
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if (kind := config["_class_name"]) not in _CLASSES:
                raise ControlFailed(f"{name} is no ControlNet that is supported: its folder says {str(kind)[:80]!r}.")
            files = _weights(path)
        shapes = {key: info.shape for file in files for key, info in read_header(file).items()}
    except BadFile as error:
        raise ControlFailed(f"The ControlNet {name} cannot be read: its file {error}") from error
    except OSError as error:
        raise ControlFailed(f"The ControlNet {name} cannot be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ControlFailed(f"The ControlNet {name} cannot be read: its config.json is damaged.") from error
    for mark, what in _OTHERS:
        if any(re.search(mark, key) for key in shapes):
            raise ControlFailed(f"{name} is {what}.")
    found = Found(control, files, shapes, config)
    if not found.is_flux and not found.is_original and "controlnet_cond_embedding.conv_in.weight" not in shapes:
        raise ControlFailed(
            f"{name} is no ControlNet that is known here: its file holds none of a ControlNet's layers."
        )
    return found


def _weights(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder in diffusers format. Raises FileNotFoundError."""
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return tuple(folder / Path(name).name for name in sorted(names))
    files = sorted(folder.glob("*.safetensors"), key=lambda file: len(file.name))  # without a variant's name first
    if not files:
        raise FileNotFoundError(2, "its folder holds no .safetensors file")
    return (files[0],)


def load(found: Found, denoiser: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The network on `device`. denoiser: the model's UNet or Flux transformer. Raises ControlFailed."""
    from diffusers import ControlNetModel, FluxControlNetModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    control = found.control
    network_class: Any = FluxControlNetModel if found.is_flux else ControlNetModel
    try:
        shapes = _named(
            found, {key: torch.empty(shape, device="meta") for key, shape in found.shapes.items()}, denoiser
        )
        config = _configuration(found, network_class, shapes, denoiser)
        _check(control.name, network_class, shapes, config, denoiser)
        with quiet(), torch.device("meta"):
            network = network_class.from_config(config)
        tensors = {key: tensor for file in found.files for key, tensor in load_file(file).items()}
        tensors = {key: tensor.to(dtype) for key, tensor in _named(found, tensors, denoiser).items()}
        network.load_state_dict(tensors, strict=True, assign=True)
    except ControlFailed:
        raise
    except (OSError, SafetensorError) as error:
        raise ControlFailed(f"The ControlNet {control.name} cannot be read: {first_line(error)}") from error
    except Exception as error:  # whatever torch and diffusers make of tensors that do not belong together
        raise ControlFailed(
            f"The ControlNet {control.name} does not load: {_misfit(error)}. Take its file from its source again."
        ) from error
    network.eval().requires_grad_(False).to(device, **({} if found.is_flux else {"memory_format": torch.channels_last}))
    if not finite.is_finite(network.parameters()):
        raise ControlFailed(f"The ControlNet {control.name} holds numbers that are none: its file is damaged.")
    return network


def _misfit(error: Exception) -> str:
    """The first of what load_state_dict lists under its first line, or that line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[1:2] or lines or [type(error).__name__]).rstrip(".: ")[:300]


def _named(found: Found, tensors: dict[str, Tensor], denoiser: Any) -> dict[str, Tensor]:
    """`tensors` in diffusers' names."""
    if not found.is_original:
        return tensors
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_controlnet_checkpoint

    own = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)} or tensors
    named = convert_controlnet_checkpoint(own, denoiser.config)
    labels = DIFFUSERS_TO_LDM_MAPPING["controlnet"]["addition_embed_type"]  # diffusers' own conversion leaves them out
    named |= {ours: own[theirs] for ours, theirs in labels.items() if theirs in own}
    return {key: value for key, value in named.items() if value is not None}


def _configuration(found: Found, network_class: Any, shapes: Mapping[str, Tensor], denoiser: Any) -> dict[str, Any]:
    if found.config is not None:
        return dict(found.config)
    taken = inspect.signature(network_class.__init__).parameters
    config = {key: value for key, value in denoiser.config.items() if key in taken}
    return config | (_flux(shapes) if found.is_flux else _unet(shapes))


def _flux(shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    hint = shapes.get("input_hint_block.conv_out.weight")
    return {
        "in_channels": shapes["x_embedder.weight"].shape[1],
        "num_layers": layers(shapes, r"^transformer_blocks\.(\d+)\."),
        "num_single_layers": layers(shapes, r"^single_transformer_blocks\.(\d+)\."),
        "joint_attention_dim": shapes["context_embedder.weight"].shape[1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "conditioning_embedding_channels": None if hint is None else hint.shape[0],
    }


def _unet(shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    hint = "controlnet_cond_embedding"
    levels = range(layers(shapes, r"^down_blocks\.(\d+)\."))
    strides = range(1, layers(shapes, rf"^{hint}\.blocks\.(\d+)\."), 2)
    depths = [layers(shapes, rf"^down_blocks\.{level}\.attentions\.0\.transformer_blocks\.(\d+)\.") for level in levels]
    middle = layers(shapes, r"^mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    depths[-1] = depths[-1] or middle or 1  # the middle block reads the last one's
    labels = shapes.get("add_embedding.linear_1.weight")
    text = next((tensor for key, tensor in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    linear = next((tensor.dim() == 2 for key, tensor in shapes.items() if key.endswith("proj_in.weight")), None)
    attends = [f"down_blocks.{level}.attentions.0.norm.weight" in shapes for level in levels]
    read: dict[str, Any] = {
        "in_channels": shapes["conv_in.weight"].shape[1],
        "block_out_channels": tuple(shapes[f"down_blocks.{at}.resnets.0.conv1.weight"].shape[0] for at in levels),
        "down_block_types": tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "transformer_layers_per_block": tuple(depth or 1 for depth in depths),
        "conditioning_channels": shapes[f"{hint}.conv_in.weight"].shape[1],
        "conditioning_embedding_out_channels": (
            shapes[f"{hint}.conv_in.weight"].shape[0],
            *(shapes[f"{hint}.blocks.{at}.weight"].shape[0] for at in strides),
        ),
        "addition_embed_type": None if labels is None else "text_time",
    }
    if labels is not None:
        read["projection_class_embeddings_input_dim"] = labels.shape[1]
    if text is not None:
        read["cross_attention_dim"] = text.shape[1]
    if linear is not None:
        read["use_linear_projection"] = linear
    return read


def _check(
    name: str, network_class: Any, shapes: Mapping[str, Tensor], config: Mapping[str, Any], denoiser: Any
) -> None:
    """Raise ControlFailed where its residuals are not what this denoiser's layers hand on, or cannot be made so."""
    ours, theirs = kind_of(denoiser), kind_of(network_class, config)
    if ours != theirs:
        raise ControlFailed(f"The ControlNet {name} was made for {theirs}, and this model is {ours}.")
    if network_class.__name__.startswith("Flux"):
        alike = shapes["x_embedder.weight"].shape[0] == denoiser.x_embedder.weight.shape[0]
        alike = alike and config["in_channels"] <= denoiser.config.in_channels
    else:
        kept = ("block_out_channels", "layers_per_block", "cross_attention_dim")
        alike = all(_plain(config.get(key)) == _plain(denoiser.config.get(key)) for key in kept)
    if not alike:
        raise ControlFailed(f"The ControlNet {name} was made for {theirs} of another width or depth than this model's.")
    if config.get("global_pool_conditions"):
        raise ControlFailed(f"The ControlNet {name} pools its map (as `shuffle` does), which is not supported.")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def kind_of(network: Any, config: Mapping[str, Any] | None = None) -> str:
    """The family of a denoiser, or of a ControlNet's class and configuration, in words."""
    kind, config = (network, config) if config is not None else (type(network), network.config)
    if "Flux" in kind.__name__:
        return "Flux"
    if config.get("addition_embed_type") == "text_time":
        return "SDXL"
    return "Stable Diffusion 2" if config.get("use_linear_projection") else "Stable Diffusion 1"
