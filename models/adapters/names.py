"""The names of trainers: from a key of a LoRA's file to what it holds, and to the layers of a pipeline that it changes.

A name is a module's path behind a prefix, with dots or with underscores. Paths are diffusers' and transformers' own, or
those of the layout that a model was published in. So all paths of the loaded networks are written in every spelling,
with underscores, and a name is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_DENOISER = (
    "lora_unet_",  # kohya; LyCORIS and ComfyUI too
    "lora_transformer_",  # OneTrainer
    "oft_unet_",
    "lycoris_",  # ai-toolkit, SimpleTuner
    "unet_",
    "transformer_",
    "diffusion_model_",  # ComfyUI, ai-toolkit
    "model_diffusion_model_",
    "base_model_model_",  # PEFT
    "",
)
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": _DENOISER,
    "transformer": _DENOISER,
    "text_encoder": (
        "lora_te_",
        "lora_te1_",
        "text_encoder_",
        "text_encoders_clip_l_transformer_",
        "text_encoders_clip_h_transformer_",
    ),
    "text_encoder_2": (
        "lora_te2_",
        "lora_te3_",
        "text_encoder_2_",
        "text_encoders_clip_g_transformer_",
        "text_encoders_t5xxl_transformer_",
    ),
    "text_encoder_3": ("lora_te3_", "text_encoder_3_", "text_encoders_t5xxl_transformer_"),
}
COMPONENTS = tuple(_PREFIXES)
_PAIR = re.compile(r"(?:[._]lora|\.lora_linear_layer)([12]?)\.(down|up)\.weight$")
_PEFT = re.compile(r"\.lora_([AB])(?:\.default)?\.(weight|bias)$")
_PART = re.compile(
    r"\.(lora_(?:down|up|mid)\.weight|lora_up\.bias|alpha|dora_scale|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?"
    r"|oft_blocks|rescale|diff|diff_b|w_norm|b_norm)$"
)


@dataclass(frozen=True, slots=True)
class Place:
    """A layer, and which rows of the file's matrix are its own: one fused matrix becomes several layers. (): all."""

    component: str
    path: str
    rows: tuple[slice, ...] = ()


def split(key: str) -> tuple[str, str] | None:
    """A key as the name of a layer, as written in the file, and the part that the tensor is, by kohya's word for it."""
    key = _PAIR.sub(r"\1.lora_\2.weight", key)
    key = _PEFT.sub(lambda match: f".lora_{'down' if match[1] == 'A' else 'up'}.{match[2]}", key)
    key = re.sub(r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?$", ".dora_scale", key)
    match = _PART.search(key)
    return None if match is None else (key[: match.start()], match[1])


class Places:
    """The layers of a pipeline's networks by every name that a trainer has for them."""

    def __init__(self, pipeline: Any) -> None:
        networks = {name: getattr(pipeline, name, None) for name in COMPONENTS}
        self.networks: dict[str, Any] = {name: one for name, one in networks.items() if one is not None}
        self._found = {component: _spelled(component, network) for component, network in self.networks.items()}

    def find(self, name: str) -> tuple[Place, ...]:
        """() for a name that no layer has."""
        flat = name.replace(".", "_").replace("_processor_to_", "_to_")
        for component, found in self._found.items():
            for prefix in _PREFIXES[component]:
                if flat.startswith(prefix) and (places := found.get(flat[len(prefix) :])):
                    return places
        return ()

    def module(self, place: Place) -> nn.Module:
        module: nn.Module = self.networks[place.component].get_submodule(place.path)
        return module


def shape(module: nn.Module) -> tuple[int, ...]:
    """Of the layer's weight, also where the numbers themselves are packed."""
    from torch import nn

    match module:
        case nn.Linear():
            return module.out_features, module.in_features
        case nn.Conv2d():
            return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    return tuple(module.weight.shape)  # type: ignore[arg-type]


def _spelled(component: str, network: Any) -> dict[str, tuple[Place, ...]]:
    modules = {path: part for path, part in network.named_modules() if part._parameters.get("weight") is not None}
    found: dict[str, tuple[Place, ...]] = {}
    for path in modules:
        spellings = [path, path.removesuffix(".0")] if path.endswith(".to_out.0") else [path]
        if component == "unet":
            spellings += [theirs for one in spellings for theirs in _ldm(one, network.config.layers_per_block)]
        elif component != "transformer":
            spellings = list(_clip(path))
        found |= {one.replace(".", "_"): (Place(component, path),) for one in spellings}
    if component == "transformer":
        for name, paths in _bfl(modules):
            if all(path in modules for path in paths):
                ends = [0]
                for path in paths:
                    ends.append(ends[-1] + shape(modules[path])[0])
                rows: list[tuple[slice, ...]] = [(slice(begin, end),) for begin, end in pairwise(ends)]
                if name == _FINAL:  # shift and scale there, scale and shift here
                    rows = [(slice(ends[1] // 2, ends[1]), slice(0, ends[1] // 2))]
                places = [Place(component, path, part) for path, part in zip(paths, rows, strict=True)]
                found[name.replace(".", "_")] = tuple(places)
    return found


def _ldm(path: str, layers: int) -> Iterator[str]:
    """A UNet's path as CompVis and Stability AI named it. layers: residual layers of a level on its way down."""
    if path in _LDM_ENDS:
        yield _LDM_ENDS[path]
    block = re.match(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", path)
    if block is None:
        return
    way, first, kind, index, inner = block[1], int(block[2] or 0) * (layers + 1), block[3], int(block[4]), block[5]
    column = 0 if kind == "resnets" else 1
    inner = _LDM_INNER.get(inner, inner) if kind == "resnets" else inner
    if kind == "downsamplers":
        yield f"input_blocks.{first + layers + 1}.0.op"
    elif kind == "upsamplers":  # behind the attention, where its level has some
        yield from (f"output_blocks.{first + layers}.{column}.conv" for column in (1, 2))
    elif way == "mid_block":
        yield f"middle_block.{1 if column else 2 * index}.{inner}"
    elif way == "down_blocks":
        yield f"input_blocks.{first + index + 1}.{column}.{inner}"
    else:
        yield f"output_blocks.{first + index}.{column}.{inner}"


def _clip(path: str) -> Iterator[str]:
    """A text encoder's path with and without its outer level, in CLIP's words and in diffusers' older ones."""
    bare = path.removeprefix("text_model.")
    for one in (bare, f"text_model.{bare}"):
        yield one
        yield re.sub(r"self_attn\.(?:([qkv])_proj|out_proj)$", lambda m: f"self_attn.to_{m[1] or 'out'}", one)


def _bfl(modules: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of Black Forest Labs' layout of Flux, and XLabs', each with the paths that its rows belong to in turn."""
    yield from _BFL.items()
    for block in {match[0] for path in modules if (match := re.match(r"(?:single_)?transformer_blocks\.\d+", path))}:
        single, number = block.startswith("single"), block.rpartition(".")[2]
        for name, paths in (_SINGLE if single else _DOUBLE).items():
            names = f"{'single' if single else 'double'}_blocks.{number}.{name}"
            yield names, tuple(f"{block}.{path}" for path in paths.split())


_LDM_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_LDM_INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_FINAL = "final_layer.adaLN_modulation.1"
_EMBEDDERS = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
_BFL: Mapping[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    _FINAL: ("norm_out.linear",),
    **{
        f"{theirs}.{layer}": (f"time_text_embed.{ours}_embedder.linear_{number}",)
        for theirs, ours in _EMBEDDERS.items()
        for layer, number in (("in_layer", 1), ("out_layer", 2))
    },
}
_QKV = "attn.to_q attn.to_k attn.to_v"
_ADDED = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_DOUBLE = {
    "img_attn.qkv": _QKV,
    "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.qkv": _ADDED,
    "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "processor.qkv1": _QKV,
    "processor.proj1": "attn.to_out.0",
    "processor.qkv2": _ADDED,
    "processor.proj2": "attn.to_add_out",
}
_SINGLE = {
    "linear1": f"{_QKV} proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "processor.qkv": _QKV,
    "processor.proj": "proj_out",
}
