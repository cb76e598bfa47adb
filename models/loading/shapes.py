"""Configurations of the published families, so that a file of weights is enough.

What the tensors do not show (heads, groups, activations, schedules) is in shapes.json. Widths, and the depth of Flux,
are read off the tensors: a model that was trained narrower in the published structure loads as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from models.base import Distilled
from models.errors import LoadFailed

from .footprint import NETWORKS
from .header import TensorInfo
from .quantised import COMPANIONS
from .recognise import Network, Role, layers

HEAD = 64  # channels of an attention head, of every published CLIP and of SD2's and SDXL's UNets
_TENSORS = {"sd15": 686, "sd21": 686, "sdxl": 1680, "sdxl-refiner": 1220}  # of the published UNets

Configuration = dict[str, Any]


@cache
def _published() -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "shapes.json").read_text(encoding="utf-8"))
    return found


def unusual(family: str, networks: Mapping[Role, Network]) -> str | None:
    """Why the published structure of `family` does not fit these networks, if it does not."""
    expected, found = _TENSORS.get(family), networks.get("unet")
    if expected is None or found is None:
        return None
    counted = sum(name.rpartition(".")[2] not in COMPANIONS for name in found.tensors)
    if counted == expected:
        return None
    return (
        f"has a UNet of {counted} tensors, and the published one of {family} has {expected}: layers were "
        "taken out or added. Give it in the models file, with a folder of its configurations under `config`"
    )


def configurations(
    family: str, networks: Mapping[str, Network], distilled: Distilled | None = None
) -> dict[str, Configuration]:
    """Path in a diffusers folder → its content.

    networks: as found in the model's files, by component; one that is missing is taken to be as published. distilled:
    its UNet is, and samples as SD-Turbo and LCM are published. Raises LoadFailed.
    """
    ours = _published()["families"][family]
    scheduler = dict(ours["scheduler"])
    if distilled is not None and "unet" in ours:
        lcm = {"_class_name": "LCMScheduler"}
        euler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
        scheduler |= lcm if distilled == "lcm" else euler
    index: Configuration = {
        "_class_name": ours["pipeline"],
        **ours.get("settings", {}),
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    files = {"model_index.json": index, "scheduler/scheduler_config.json": scheduler}
    for component in NETWORKS:
        if component not in ours:
            continue
        config = {**_published()["networks"][ours[component]], **ours.get(f"{component}_changes", {})}
        if (network := networks.get(component)) is not None:
            try:
                config |= _READ[network.role](network, config)
            except (LookupError, ValueError) as error:
                raise LoadFailed(
                    f"The {component} of the file lacks a tensor that every {family} has: {error}."
                ) from error
        files[f"{component}/config.json"] = config
        if "architectures" not in config:
            index[component] = ["diffusers", config["_class_name"]]
            continue
        index[component] = ["transformers", *config["architectures"]]
        tokenizer = "T5Tokenizer" if config["model_type"] == "t5" else "CLIPTokenizer"
        index[component.replace("text_encoder", "tokenizer")] = ["transformers", tokenizer]
    return files


def _unet(network: Network, config: Configuration) -> Configuration:
    levels, step = len(config["block_out_channels"]), config["layers_per_block"] + 1
    widths = [
        network.tensors[f"input_blocks.{1 + level * step}.0.out_layers.3.weight"].shape[0] for level in range(levels)
    ]
    text = network.ending("attn2.to_k.weight")
    read: Configuration = {
        "in_channels": network.tensors["input_blocks.0.0.weight"].shape[1],
        "block_out_channels": widths,
        "cross_attention_dim": text.shape[1],
    }
    if isinstance(config["attention_head_dim"], list):
        read["attention_head_dim"] = [max(1, width // HEAD) for width in widths]
    if "projection_class_embeddings_input_dim" in config:
        read["projection_class_embeddings_input_dim"] = network.tensors["label_emb.0.0.weight"].shape[1]
    return read


def _flux(network: Network, config: Configuration) -> Configuration:
    tensors, published = network.tensors, "img_in.weight" in network.tensors
    names = (
        (
            "img_in",
            "txt_in",
            "vector_in.in_layer",
            "guidance_in.",
            r"^double_blocks\.(\d+)\.",
            r"^single_blocks\.(\d+)\.",
        )
        if published
        else (
            "x_embedder",
            "context_embedder",
            "time_text_embed.text_embedder.linear_1",
            "time_text_embed.guidance_embedder.",
            r"^transformer_blocks\.(\d+)\.",
            r"^single_transformer_blocks\.(\d+)\.",
        )
    )
    image, text, pooled, guidance, double, single = names
    width, channels = tensors[f"{image}.weight"].shape
    return {
        "in_channels": channels,
        "out_channels": tensors["final_layer.linear.weight" if published else "proj_out.weight"].shape[0],
        "num_attention_heads": width // config["attention_head_dim"],
        "joint_attention_dim": tensors[f"{text}.weight"].shape[1],
        "pooled_projection_dim": tensors[f"{pooled}.weight"].shape[1],
        "guidance_embeds": any(name.startswith(guidance) for name in tensors),
        "num_layers": layers(tensors, double),
        "num_single_layers": layers(tensors, single),
    }


def _vae(network: Network, config: Configuration) -> Configuration:
    levels = len(config["block_out_channels"])
    names = ("encoder.down.{}.block.0.conv2.weight", "encoder.down_blocks.{}.resnets.0.conv2.weight")
    return {
        "block_out_channels": [
            network.ending(*(name.format(level) for name in names)).shape[0] for level in range(levels)
        ]
    }


def _clip(network: Network, config: Configuration) -> Configuration:
    vocabulary, width = network.ending("token_embedding.weight").shape
    projection = network.tensors.get("text_projection.weight")
    if (theirs := network.tensors.get("text_projection")) is not None:
        projection = TensorInfo(theirs.shape[::-1], theirs.dtype)  # OpenCLIP's lies on the other side
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": max(1, width // HEAD),
        "intermediate_size": network.ending(".0.mlp.fc1.weight", ".0.mlp.c_fc.weight").shape[0],
        "max_position_embeddings": network.ending("position_embedding.weight", "positional_embedding").shape[0],
        "projection_dim": width if projection is None else projection.shape[0],
    }


def _t5(network: Network, config: Configuration) -> Configuration:
    tensors, block = network.tensors, "encoder.block.0.layer"
    words, width = network.ending("shared.weight", "embed_tokens.weight").shape
    return {
        "vocab_size": words,
        "d_model": width,
        "d_ff": tensors[f"{block}.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_heads": tensors[f"{block}.0.SelfAttention.q.weight"].shape[0] // config["d_kv"],
        "num_layers": layers(tensors, r"^encoder\.block\.(\d+)\."),
    }


_READ: Mapping[Role, Callable[[Network, Configuration], Configuration]] = {
    "unet": _unet,
    "flux": _flux,
    "vae4": _vae,
    "vae16": _vae,
    "clip_l": _clip,
    "clip_h": _clip,
    "clip_g": _clip,
    "t5": _t5,
}
