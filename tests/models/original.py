"""A diffusers pipeline's weights under the names of the original checkpoints (CompVis's, Black Forest Labs').

Written from the layout of the published files, as an oracle for diffusers' conversion in the other direction.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from models.base import ModelSpec
from models.loading.checkpoints import CheckpointFolder
from models.loading.header import Header, TensorInfo
from models.loading.shapes import configurations

Tensors = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ROOT = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(key: str, layers: int, up_attends: list[bool]) -> str:
    """CompVis numbers the down path's layers and downsamplers through, and the up path's layers with what follows."""
    for ours, theirs in ROOT.items():
        if key.startswith(ours + "."):
            return key.replace(ours, theirs, 1)
    place = re.match(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    if place is None:
        part, index, rest = re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.*)", key).groups()  # type: ignore[union-attr]
        at = 1 if part == "attentions" else 2 * int(index)
        return f"middle_block.{at}.{resnet_name(rest)}"
    path, block, part, index, rest = place[1], int(place[2]), place[3], int(place[4]), place[5]
    slot = {"resnets": 0, "attentions": 1}.get(part)
    if path == "down_blocks":
        if slot is None:
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{(layers + 1) * block + index + 1}.{slot}.{resnet_name(rest)}"
    if slot is None:
        return f"output_blocks.{(layers + 1) * block + layers}.{2 if up_attends[block] else 1}.{rest}"
    return f"output_blocks.{(layers + 1) * block + index}.{slot}.{resnet_name(rest)}"


def resnet_name(rest: str) -> str:
    head, dot, tail = rest.partition(".")
    return RESNET.get(head, head) + dot + tail


def vae_name(key: str, levels: int) -> str:
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)


ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def autoencoder(vae: Any) -> Tensors:
    """As in a file of its own; the projections of its attention are 1×1 convolutions there."""
    tensors: Tensors = {}
    levels = len(vae.config.block_out_channels)
    for key, value in vae.state_dict().items():
        part = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(\w+(?:\.0)?)\.(weight|bias)", key)
        if part is None:
            tensors[vae_name(key, levels)] = value
        else:
            name = f"{part[1]}.mid.attn_1.{ATTENTION[part[2]]}.{part[3]}"
            tensors[name] = value[..., None, None] if value.dim() == 2 else value
    return tensors


OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def clip(encoder: Any) -> Tensors:
    """As transformers once named them, under `text_model`."""
    state = encoder.state_dict().items()
    return {key if key.startswith("text_") else f"text_model.{key}": value for key, value in state}


def open_clip(encoder: Any) -> Tensors:
    """As OpenCLIP names them: queries, keys and values in one matrix, the projection on the other side."""
    tensors: Tensors = {}
    state = encoder.state_dict()
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if name == "text_projection.weight":
            tensors["text_projection"] = value.T
        elif "self_attn." not in name:
            tensors[name] = value
        elif ".q_proj." in name:
            parts = [state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            joined = name.replace("self_attn.q_proj.", "attn.in_proj_")
            tensors[joined] = torch.cat(parts)
    return tensors


def stable_diffusion(pipeline: Any) -> Tensors:
    """As the published checkpoints: one file with UNet, autoencoder and text encoders."""
    attends = ["Cross" in block for block in pipeline.unet.config.up_block_types]
    tensors: Tensors = {}
    for key, value in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + unet_name(key, pipeline.unet.config.layers_per_block, attends)] = value
    tensors |= {f"first_stage_model.{key}": value for key, value in autoencoder(pipeline.vae).items()}
    if hasattr(pipeline, "text_encoder_2"):
        encoders = {}
        if getattr(pipeline, "text_encoder", None) is not None:  # the refiner has the second alone
            encoders["conditioner.embedders.0.transformer."] = clip(pipeline.text_encoder)
        encoders[f"conditioner.embedders.{len(encoders)}.model."] = open_clip(pipeline.text_encoder_2)
    elif pipeline.unet.config.use_linear_projection:
        encoders = {"cond_stage_model.model.": open_clip(pipeline.text_encoder)}
    else:
        encoders = {"cond_stage_model.transformer.": clip(pipeline.text_encoder)}
    for prefix, encoder in encoders.items():
        tensors |= {prefix + key: value for key, value in encoder.items()}
    return tensors


def save_stable_diffusion(pipeline: Any, file: Path) -> None:
    save(stable_diffusion(pipeline), file)


def save(tensors: Tensors, file: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)


FLUX_ROOT = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}


def flux(transformer: Any) -> Tensors:
    """As flux1-dev.safetensors: the transformer alone, queries, keys and values in one matrix."""
    state: Tensors = dict(transformer.state_dict())
    tensors: Tensors = {}

    def move(ours: str, theirs: str) -> None:
        for end in ("weight", "bias"):
            if f"{ours}.{end}" in state:
                name = f"{theirs}.scale" if "_norm" in theirs else f"{theirs}.{end}"
                tensors[name] = state[f"{ours}.{end}"]

    def join(parts: list[str], theirs: str) -> None:
        for end in ("weight", "bias"):
            tensors[f"{theirs}.{end}"] = torch.cat([state[f"{part}.{end}"] for part in parts])

    for ours, theirs in FLUX_ROOT.items():
        move(ours, theirs)
    for end in ("weight", "bias"):  # shift and scale stand in the other order
        scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
        tensors[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    for at in range(len(transformer.transformer_blocks)):
        ours, theirs = f"transformer_blocks.{at}.", f"double_blocks.{at}."
        for mine, published in FLUX_DOUBLE.items():
            move(ours + mine, theirs + published)
        join([f"{ours}attn.to_{name}" for name in "qkv"], f"{theirs}img_attn.qkv")
        join([f"{ours}attn.add_{name}_proj" for name in "qkv"], f"{theirs}txt_attn.qkv")
    for at in range(len(transformer.single_transformer_blocks)):
        ours, theirs = f"single_transformer_blocks.{at}.", f"single_blocks.{at}."
        for mine, published in FLUX_SINGLE.items():
            move(ours + mine, theirs + published)
        join([*(f"{ours}attn.to_{name}" for name in "qkv"), f"{ours}proj_mlp"], f"{theirs}linear1")
    return tensors


def save_flux(transformer: Any, file: Path) -> None:
    save(flux(transformer), file)


NARROW: Mapping[str, Mapping[str, Any]] = {
    "unet": {"block_out_channels": [32, 64, 96, 96]},
    "transformer": {"num_attention_heads": 1, "num_layers": 2, "num_single_layers": 2},
    "vae": {"block_out_channels": [32, 64, 96, 96]},
    "text_encoder": {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128, "projection_dim": 64},
    "t5": {"d_model": 64, "num_heads": 1, "d_ff": 64, "vocab_size": 400},
}


def narrow(family: str) -> dict[str, dict[str, Any]]:
    """The published configurations of a family, as they stand but for widths (and Flux's depth)."""
    files = configurations(family, {})
    for path, config in files.items():
        component = path.partition("/")[0].removesuffix("_2")
        config |= NARROW["t5"] if config.get("model_type") == "t5" else NARROW.get(component, {})
    if "unet/config.json" in files:
        unet = files["unet/config.json"]
        unet["block_out_channels"] = unet["block_out_channels"][: len(unet["down_block_types"])]
        unet["cross_attention_dim"] = 128 if family == "sdxl" else 64
        if family != "sd15":
            unet["attention_head_dim"] = [max(1, width // 64) for width in unet["block_out_channels"]]
        if numbers := {"sdxl": 6, "sdxl-refiner": 5}.get(family):
            unet["projection_class_embeddings_input_dim"] = 64 + numbers * unet["addition_time_embed_dim"]
    else:
        files["transformer/config.json"] |= {"joint_attention_dim": 64, "pooled_projection_dim": 64}
    return files


def networks(files: Mapping[str, Mapping[str, Any]], device: str = "meta") -> SimpleNamespace:
    """A family's networks by component: without weights, or on another device with random ones."""
    import diffusers
    import transformers

    made = {}
    with torch.device(device):
        for path, config in files.items():
            component, _, file = path.partition("/")
            if file == "config.json" and "architectures" in config:
                network_class = getattr(transformers, config["architectures"][0])
                made[component] = network_class(network_class.config_class(**config))
            elif file == "config.json":
                made[component] = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    return SimpleNamespace(**made)


def filled(tensors: Tensors, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensors:
    """Random weights in their places, under which activations keep their scale."""
    generator = torch.Generator().manual_seed(seed)

    def fill(name: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) < 2:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
        scale = 0.5 / max(1, shape[1:].numel()) ** 0.5
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(scale).to(dtype)

    return {name: fill(name, tensor.shape) for name, tensor in tensors.items()}


def write_stable_diffusion(file: Path, family: str = "sd15", *, full: bool = False, seed: int = 0) -> None:
    """A checkpoint of random half-precision weights under the true names, narrow or in the published size."""
    made = networks(configurations(family, {}) if full else narrow(family))
    save(filled(stable_diffusion(made), seed=seed), file)


def header_of(tensors: Tensors, metadata: dict[str, str] | None = None) -> Header:
    """What `read_header` finds of them in a file in half precision."""
    return Header({name: TensorInfo(tuple(tensor.shape), "F16") for name, tensor in tensors.items()}, metadata)


def write_hollow(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Their file in half precision with a true header, and a hole where the numbers would be: it takes no disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


@cache
def narrow_networks(family: str) -> SimpleNamespace:
    """Its networks, with random weights that half precision holds exactly."""
    torch.manual_seed(7)
    made = networks(narrow(family), "cpu")
    for network in vars(made).values():
        network.half().float()
    return made


@cache
def checkpoint(family: str) -> Tensors:
    made = narrow_networks(family)
    tensors = flux(made.transformer) if family.startswith("flux") else stable_diffusion(made)
    return {name: tensor.half() for name, tensor in tensors.items()}


def listed(folder: Path, *configured: ModelSpec) -> tuple[dict[str, ModelSpec], dict[str, str]]:
    checkpoints = CheckpointFolder(folder)
    checkpoints.scan()
    served, unserved = checkpoints.models(configured)
    return {spec.name: spec for spec in served}, unserved


def hollow(file: Path, family: str = "sd15", leave: str = "nothing") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_hollow(file, {key: tensor for key, tensor in checkpoint(family).items() if not key.startswith(leave)})
    return file


if __name__ == "__main__":  # python -m tests.models.original FILE: a Stable Diffusion 1.5 in its published size
    write_stable_diffusion(Path(sys.argv[1]), full=True)
