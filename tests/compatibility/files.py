"""The kinds of file that people have, as data: what each is, which model it is tried on, what comes of it.

`docs/compatibility.md` has a line for each. A kind is written at small width, with the key names and the order of
shapes that its trainer writes, and loaded; its picture is that of weights that the test merges by hand, or it is
refused by the sentence here. `adapters.py` writes and `test_files.py` draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Group = Literal["Checkpoint", "LoRA", "Embedding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRow:
    """One kind of file. `key`: one of its tensors. `said`: its refusal, or what `warnings` says beside the picture."""

    group: Group
    kind: str
    model: str
    key: str
    said: str = ""
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRow(FileRow):
    """`layers`: the trainer's name → the layers whose rows its matrix has, in turn, `component:path` each.

    `algebra`: what it makes of a weight, see `adapters.ALGEBRA`. `suffixes`: kohya's word for a part → the file's, in
    the denoiser and in text encoders. `odd`: shapes of further tensors. `spoilt`: changes the tensors before they are
    saved.
    """

    group: Group = "LoRA"
    layers: Mapping[str, str]
    algebra: str = "lora"
    suffixes: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    dtype: str = "float32"
    header: Mapping[str, str] = field(default_factory=dict)
    odd: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    spoilt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRow(FileRow):
    """`tensors`: key → (vectors, width); a width of 0 is that of the model's own encoder of that place."""

    group: Group = "Embedding"
    tensors: Mapping[str, tuple[int, int]]
    dtype: str = "float32"
    bundled: bool = False
    spoilt: str = ""


# How trainers spell the parts of a pair, where not as kohya does.
PEFT = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}
DIFFUSERS = {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"}
LINEAR_LAYER = {f"lora_{way}.weight": f"lora_linear_layer.{way}.weight" for way in ("down", "up")}
XLABS = {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight"}

# Layers by diffusers' and transformers' paths.
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET = (
    f"{ATTENTION}.attn1.to_q",
    f"{ATTENTION}.attn1.to_out.0",
    f"{ATTENTION}.attn2.to_k",
    f"{ATTENTION}.ff.net.0.proj",
    "down_blocks.1.attentions.0.proj_in",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
)
CONVOLUTIONS = (
    "down_blocks.0.resnets.1.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.1.conv2",
    "up_blocks.1.upsamplers.0.conv",
    "up_blocks.1.resnets.0.conv_shortcut",
)
EMBEDDERS = ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out")
CLIP = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.1.self_attn.out_proj",
    "encoder.layers.1.mlp.fc1",
)
T5 = (
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.1.layer.1.DenseReluDense.wo",
)
# The same SDXL layers by Stability's names.
XL_DOWN, XL_MID, XL_UP = "unet:down_blocks", "unet:mid_block.attentions.0.transformer_blocks", "unet:up_blocks"
SGM = {
    "input_blocks.4.1.transformer_blocks.1.attn1.to_q": f"{XL_DOWN}.1.attentions.0.transformer_blocks.1.attn1.to_q",
    "input_blocks.8.1.transformer_blocks.9.attn2.to_k": f"{XL_DOWN}.2.attentions.1.transformer_blocks.9.attn2.to_k",
    "middle_block.1.transformer_blocks.3.ff.net.0.proj": f"{XL_MID}.3.ff.net.0.proj",
    "output_blocks.2.1.transformer_blocks.0.attn1.to_out.0": f"{XL_UP}.0.attentions.2.transformer_blocks.0.attn1.to_out.0",
    "output_blocks.3.1.proj_in": "unet:up_blocks.1.attentions.0.proj_in",
}
SGM_CONVOLUTIONS = {
    "input_blocks.0.0": "unet:conv_in",
    "time_embed.0": "unet:time_embedding.linear_1",
    "label_emb.0.0": "unet:add_embedding.linear_1",
    "label_emb.0.2": "unet:add_embedding.linear_2",
    "input_blocks.1.0.in_layers.2": "unet:down_blocks.0.resnets.0.conv1",
    "input_blocks.3.0.op": "unet:down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "unet:down_blocks.1.resnets.0.conv_shortcut",
    "middle_block.2.out_layers.3": "unet:mid_block.resnets.1.conv2",
    "output_blocks.2.2.conv": "unet:up_blocks.0.upsamplers.0.conv",
    "output_blocks.8.0.emb_layers.1": "unet:up_blocks.2.resnets.2.time_emb_proj",
    "out.2": "unet:conv_out",
}
SD_LDM = {
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": f"unet:{ATTENTION}.attn1.to_q",
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k": f"unet:{ATTENTION}.attn2.to_k",
    "input_blocks.4.1.proj_in": "unet:down_blocks.1.attentions.0.proj_in",
    "middle_block.1.transformer_blocks.0.attn2.to_v": "unet:mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "output_blocks.2.1.conv": "unet:up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "unet:up_blocks.1.upsamplers.0.conv",
}
# Flux by diffusers' paths, and by Black Forest Labs' names, of which some are several layers fused.
FLUX = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.0.attn.to_add_out",
    "transformer_blocks.1.ff.net.0.proj",
    "transformer_blocks.1.norm1.linear",
    "single_transformer_blocks.0.attn.to_v",
    "single_transformer_blocks.1.proj_mlp",
    "single_transformer_blocks.1.proj_out",
)
FLUX_ENDS = (
    "x_embedder",
    "context_embedder",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.guidance_embedder.linear_2",
    "norm_out.linear",
    "proj_out",
)


def _block(block: str, *names: str) -> str:
    return " ".join(f"transformer:{block}.{name}" for name in names)


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
BFL = {
    "double_blocks.0.img_attn.qkv": _block("transformer_blocks.0", *_QKV),
    "double_blocks.0.img_attn.proj": _block("transformer_blocks.0", "attn.to_out.0"),
    "double_blocks.1.txt_attn.qkv": _block(
        "transformer_blocks.1", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
    ),
    "double_blocks.1.txt_attn.proj": _block("transformer_blocks.1", "attn.to_add_out"),
    "double_blocks.0.img_mlp.0": _block("transformer_blocks.0", "ff.net.0.proj"),
    "double_blocks.1.txt_mlp.2": _block("transformer_blocks.1", "ff_context.net.2"),
    "double_blocks.0.img_mod.lin": _block("transformer_blocks.0", "norm1.linear"),
    "double_blocks.1.txt_mod.lin": _block("transformer_blocks.1", "norm1_context.linear"),
    "single_blocks.0.linear1": _block("single_transformer_blocks.0", *_QKV, "proj_mlp"),
    "single_blocks.1.linear2": _block("single_transformer_blocks.1", "proj_out"),
    "single_blocks.1.modulation.lin": _block("single_transformer_blocks.1", "norm.linear"),
}
BFL_ENDS = {
    "img_in": "transformer:x_embedder",
    "txt_in": "transformer:context_embedder",
    "time_in.in_layer": "transformer:time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "transformer:time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "transformer:time_text_embed.text_embedder.linear_1",
    "guidance_in.in_layer": "transformer:time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "transformer:time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "swapped:transformer:norm_out.linear",  # shift and scale, here scale and shift
    "final_layer.linear": "transformer:proj_out",
}
XLABS_DOUBLE = {
    "double_blocks.0.processor.qkv_lora1": BFL["double_blocks.0.img_attn.qkv"],
    "double_blocks.0.processor.proj_lora1": BFL["double_blocks.0.img_attn.proj"],
    "double_blocks.1.processor.qkv_lora2": BFL["double_blocks.1.txt_attn.qkv"],
    "double_blocks.1.processor.proj_lora2": BFL["double_blocks.1.txt_attn.proj"],
}
XLABS_SINGLE = {
    "single_blocks.0.processor.qkv_lora": _block("single_transformer_blocks.0", *_QKV),
    "single_blocks.1.processor.proj_lora": _block("single_transformer_blocks.1", "proj_out"),
}


def _flat(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {prefix + name.replace(".", "_"): targets for name, targets in names.items()}


def _dotted(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {prefix + name: targets for name, targets in names.items()}


def _of(component: str, paths: tuple[str, ...], inner: str = "") -> dict[str, str]:
    """As in the model; `inner`: a level that files have and transformers 5 has not."""
    return {inner + path: f"{component}:{path}" for path in paths}


def _old(names: Mapping[str, str]) -> dict[str, str]:
    """diffusers' attention processors, and text encoders in their words."""
    words = {".to_q": ".processor.to_q_lora", ".to_k": ".processor.to_k_lora", ".to_v": ".processor.to_v_lora"}
    words |= {".to_out.0": ".processor.to_out_lora", ".q_proj": ".to_q_lora", ".out_proj": ".to_out_lora"}
    ends = {name: next((end for end in words if name.endswith(end)), "") for name in names}
    return {name.removesuffix(end) + words[end]: names[name] for name, end in ends.items() if end}


MODEL = "text_model."
SD_UNET, SD_TEXT = _of("unet", UNET), _of("text_encoder", CLIP, MODEL)
XL_TEXTS = (SD_TEXT, _of("text_encoder_2", CLIP, MODEL))
FLUX_UNET = _of("transformer", FLUX)
KOHYA_SD = _flat("lora_unet_", SD_UNET) | _flat("lora_te_", SD_TEXT)
KOHYA_XL = _flat("lora_unet_", SGM) | _flat("lora_te1_", XL_TEXTS[0]) | _flat("lora_te2_", XL_TEXTS[1])
KOHYA_FLUX = _flat("lora_unet_", BFL)
PIPELINE_SD = _dotted("unet.", SD_UNET) | _dotted("text_encoder.", SD_TEXT)
PIPELINE_XL = (
    _dotted("unet.", _of("unet", ("down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", *UNET[:5])))
    | _dotted("text_encoder.", XL_TEXTS[0])
    | _dotted("text_encoder_2.", XL_TEXTS[1])
)
LIGHTNING = _flat("lora_unet_", _of("unet", (*UNET, *CONVOLUTIONS, *EMBEDDERS)))
ADDED = _flat("lora_unet_", _of("unet", ("add_embedding.linear_1", "add_embedding.linear_2", *UNET, *EMBEDDERS)))
SETTINGS = '{"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 2}, "text_encoder.lora_alpha": 6}'
Q_SD = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
Q_XL = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
Q_PATH = f"{ATTENTION}.attn1.to_q"
LYCORIS = "LyCORIS (kohya)"
MAIN = {
    "loha": "hada_w1_a",
    "loha tucker": "hada_t1",
    "lokr": "lokr_w1",
    "lokr low-rank": "lokr_w1_a",
    "lokr tucker": "lokr_t2",
    "oft": "oft_blocks",
    "oft rescaled": "rescale",
    "boft": "oft_blocks",
    "whole": "diff",
    "norm": "w_norm",
    "mid": "lora_mid.weight",
    "dora": "dora_scale",
    "dora by input": "dora_scale",
}


def _lora(
    kind: str,
    model: str,
    layers: Mapping[str, str],
    algebra: str = "lora",
    suffix: Mapping[str, str] | None = None,
    text: Mapping[str, str] | None = None,
    **more: object,
) -> LoraRow:
    """suffix: the parts' spelling in the denoiser; text: in text encoders, where it is another."""
    suffix = suffix or {}
    part = MAIN.get(algebra, "lora_down.weight")
    key = f"{next(iter(layers))}.{suffix.get(part, part)}"
    found = {"key": key, "suffixes": (suffix, text or suffix), **more}
    return LoraRow(kind=kind, model=model, layers=layers, algebra=algebra, **found)  # type: ignore[arg-type]


def _foreign(made_for: str, model: str, ours: str, trainer: str, odd: Mapping[str, tuple[int, ...]]) -> LoraRow:
    """A file of another family, of its true names and widths."""
    said = (
        f"The LoRA 'ink' was made for {made_for} (by {trainer}) and cannot be used with this model, which is {ours}: "
        f"take one that was made for {ours}, or leave it out of loras."
    )
    key = next(iter(odd))
    return LoraRow(kind=f"made for {made_for}", model=model, key=key, layers={}, odd=odd, said=said, refused=True)


def _bad(kind: str, reason: str, key: str, layers: Mapping[str, str] | None = None, **more: object) -> LoraRow:
    said = (
        f"The LoRA 'ink' cannot be used with this model: {reason} "
        "Take one that was trained for it, or leave it out of loras."
    )
    layers = KOHYA_SD if layers is None else layers
    return LoraRow(kind=kind, model="sd15", key=key, layers=layers, said=said, refused=True, **more)  # type: ignore[arg-type]


def _pair(name: str, out: int, inner: int, down: str = "lora_down", up: str = "lora_up") -> dict[str, tuple[int, ...]]:
    return {f"{name}.{down}.weight": (1, inner), f"{name}.{up}.weight": (out, 1)}


SD, XL = "Stable Diffusion 1 or 2", "SDXL"  # what the small models are known by
KOHYA = "kohya's sd-scripts"
UNPLACED = "{} layers that the LoRA 'ink' changes are none of this model's and were left out: {}."

LORAS: tuple[LoraRow, ...] = (
    _lora("kohya: UNet and text encoder, an alpha a layer", "sd15", KOHYA_SD),
    _lora("kohya, float16", "sd15", KOHYA_SD, dtype="float16"),
    _lora("kohya, bfloat16", "sd15", KOHYA_SD, dtype="bfloat16"),
    _lora("kohya, float8_e4m3fn", "sd15", KOHYA_SD, dtype="float8_e4m3fn"),
    _lora("kohya: text encoder alone", "sd15", _flat("lora_te_", SD_TEXT)),
    _lora("kohya with conv_dim (LoCon)", "sd15", _flat("lora_unet_", _of("unet", CONVOLUTIONS))),
    _lora(f"{LYCORIS}: LoCon with a core tensor", "sd15", _flat("lora_unet_", _of("unet", CONVOLUTIONS[:1])), "mid"),
    _lora(f"{LYCORIS}: LoHa", "sd15", KOHYA_SD, "loha"),
    _lora(f"{LYCORIS}: LoHa of convolutions", "sd15", _flat("lora_unet_", _of("unet", CONVOLUTIONS)), "loha"),
    _lora(
        f"{LYCORIS}: LoHa with core tensors", "sd15", _flat("lora_unet_", _of("unet", CONVOLUTIONS[:1])), "loha tucker"
    ),
    _lora(f"{LYCORIS}: LoKr, whole factors", "sd15", KOHYA_SD, "lokr"),
    _lora(f"{LYCORIS}: LoKr, factors of low rank", "sd15", KOHYA_SD, "lokr low-rank"),
    _lora(f"{LYCORIS}: LoKr of convolutions", "sd15", _flat("lora_unet_", _of("unet", CONVOLUTIONS)), "lokr"),
    _lora(
        f"{LYCORIS}: LoKr with a core tensor", "sd15", _flat("lora_unet_", _of("unet", CONVOLUTIONS[:1])), "lokr tucker"
    ),
    _lora("kohya: OFT", "sd15", _flat("oft_unet_", SD_UNET), "oft"),
    _lora(f"{LYCORIS}: diagonal OFT, rescaled", "sd15", KOHYA_SD, "oft rescaled"),
    _lora(f"{LYCORIS}: BOFT", "sd15", _flat("lora_unet_", SD_UNET), "boft"),
    _lora(f"{LYCORIS}: DoRA, a norm for each output", "sd15", KOHYA_SD, "dora"),
    _lora(f"{LYCORIS}: DoRA, a norm for each input", "sd15", KOHYA_SD, "dora by input"),
    _lora("PEFT: DoRA (use_dora)", "sd15", PIPELINE_SD, "dora", PEFT),
    _lora(f"{LYCORIS}: whole differences with biases", "sd15", KOHYA_SD, "whole"),
    _lora(
        f"{LYCORIS}: norms",
        "sd15",
        _flat("lora_unet_", _of("unet", ("mid_block.resnets.0.norm1", f"{ATTENTION}.norm2"))),
        "norm",
    ),
    _lora("diffusers, attention processors", "sd15", _dotted("unet.", _old(SD_UNET)), "lora", XLABS),
    _lora("diffusers, attention processors of a bare UNet", "sd15", _old(SD_UNET), "lora", XLABS),
    _lora(
        "diffusers, attention processors: text encoder", "sd15", _dotted("text_encoder.", _old(SD_TEXT)), "lora", XLABS
    ),
    _lora("diffusers, before PEFT", "sd15", PIPELINE_SD, "lora", DIFFUSERS, LINEAR_LAYER),
    _lora("diffusers, by PEFT", "sd15", PIPELINE_SD, "lora", PEFT),
    _lora(
        "diffusers, by PEFT, its alphas in the header",
        "sd15",
        PIPELINE_SD,
        "lora settings",
        PEFT,
        header={"lora_adapter_metadata": SETTINGS},
    ),
    _lora("PEFT, a bare UNet", "sd15", _dotted("base_model.model.", SD_UNET), "lora", PEFT),
    _lora("LCM-LoRA, Lightning, Hyper: embedders and convolutions too", "sd15", LIGHTNING),
    _lora("ComfyUI, extracted", "sd15", _dotted("diffusion_model.", SD_LDM)),
    _lora("ComfyUI: text encoder", "sd15", _dotted("text_encoders.clip_l.transformer.", SD_TEXT)),
    _lora("kohya --v2", "sd21", KOHYA_SD),
    _lora("diffusers, by PEFT", "sd21", PIPELINE_SD, "lora", PEFT),
    _lora("ComfyUI: text encoder", "sd21", _dotted("text_encoders.clip_h.transformer.", SD_TEXT)),
    _lora("kohya: UNet and both text encoders", "sdxl", KOHYA_XL),
    _lora("kohya with conv_dim, embedders and label_emb", "sdxl", _flat("lora_unet_", SGM_CONVOLUTIONS)),
    _lora(f"{LYCORIS}: LoHa", "sdxl", KOHYA_XL, "loha"),
    _lora(f"{LYCORIS}: LoKr", "sdxl", KOHYA_XL, "lokr"),
    _lora(f"{LYCORIS}: DoRA", "sdxl", KOHYA_XL, "dora by input"),
    _lora("OneTrainer, with add_embedding", "sdxl", ADDED),
    _lora("LCM-LoRA, Lightning, Hyper", "sdxl", _flat("lora_unet_", _of("unet", (*UNET[:5], *EMBEDDERS)))),
    _lora("diffusers, before PEFT", "sdxl", PIPELINE_XL, "lora", DIFFUSERS, LINEAR_LAYER),
    _lora("diffusers, by PEFT", "sdxl", PIPELINE_XL, "lora", PEFT),
    _lora("ComfyUI, extracted", "sdxl", _dotted("diffusion_model.", SGM | SGM_CONVOLUTIONS)),
    _lora(
        "ComfyUI: both text encoders",
        "sdxl",
        _dotted("text_encoders.clip_l.transformer.", XL_TEXTS[0])
        | _dotted("text_encoders.clip_g.transformer.", XL_TEXTS[1]),
    ),
    _lora("kohya: fused attention, MLP, modulation", "flux-dev", KOHYA_FLUX),
    _lora("kohya: embedders and final layer", "flux-dev", KOHYA_FLUX | _flat("lora_unet_", BFL_ENDS)),
    _lora(
        "kohya: CLIP and T5",
        "flux-dev",
        _flat("lora_te1_", SD_TEXT) | _flat("lora_te3_", _of("text_encoder_2", T5)) | KOHYA_FLUX,
    ),
    _lora(
        "kohya, of Flux dev, on Flux schnell",
        "flux-schnell",
        KOHYA_FLUX | _flat("lora_unet_", {name: of for name, of in BFL_ENDS.items() if "guidance" not in name}),
        odd=_pair("lora_unet_guidance_in_in_layer", 16, 256),
        said=UNPLACED.format("1 of the 19", "lora_unet_guidance_in_in_layer"),
    ),
    _lora("ai-toolkit, diffusers by PEFT", "flux-dev", _dotted("transformer.", FLUX_UNET), "lora", PEFT),
    _lora(
        "diffusers by PEFT: embedders and final layer",
        "flux-dev",
        _dotted("transformer.", _of("transformer", FLUX_ENDS)),
        "lora",
        PEFT,
    ),
    _lora("SimpleTuner, PEFT with alphas", "flux-dev", _dotted("transformer.", FLUX_UNET), "lora alpha", PEFT),
    _lora("PEFT, a bare transformer", "flux-dev", _dotted("base_model.model.", FLUX_UNET), "lora", PEFT),
    _lora("ai-toolkit, SimpleTuner: LoKr", "flux-dev", _flat("lycoris_", FLUX_UNET), "lokr"),
    _lora(
        "OneTrainer",
        "flux-dev",
        _flat("lora_transformer_", FLUX_UNET)
        | _flat("lora_te1_", SD_TEXT)
        | _flat("lora_te2_", _of("text_encoder_2", T5)),
    ),
    _lora("OneTrainer: DoRA", "flux-dev", _flat("lora_transformer_", FLUX_UNET), "dora by input"),
    _lora("XLabs", "flux-dev", XLABS_DOUBLE | XLABS_SINGLE, "lora", XLABS),
    _lora("XLabs: double blocks alone", "flux-dev", XLABS_DOUBLE, "lora", XLABS),
    _lora("ComfyUI, ai-toolkit", "flux-dev", _dotted("diffusion_model.", BFL), "lora", PEFT),
    _lora(
        "ComfyUI, extracted: CLIP and T5 too",
        "flux-dev",
        _dotted("diffusion_model.", BFL | BFL_ENDS)
        | _dotted("text_encoders.clip_l.transformer.", SD_TEXT)
        | _dotted("text_encoders.t5xxl.transformer.", _of("text_encoder_2", T5)),
    ),
    _lora("fal's trainers", "flux-dev", _dotted("base_model.model.", BFL | BFL_ENDS), "lora", PEFT),
    _lora(f"{LYCORIS}: LoHa of fused layers", "flux-dev", KOHYA_FLUX, "loha"),
    _lora(f"{LYCORIS}: DoRA of fused layers", "flux-dev", KOHYA_FLUX, "dora by input"),
    _lora(f"{LYCORIS}: diagonal OFT of fused layers", "flux-dev", KOHYA_FLUX | _flat("lora_unet_", BFL_ENDS), "oft"),
    _foreign(XL, "sd15", SD, KOHYA, _pair(Q_XL, 640, 640)),
    _foreign("Stable Diffusion 1.5", "sdxl", XL, KOHYA, _pair(Q_SD.replace("attn1_to_q", "attn2_to_k"), 640, 768)),
    _foreign(
        "Stable Diffusion 2.1",
        "sdxl",
        XL,
        "PEFT",
        _pair(f"unet.{Q_PATH}".replace("attn1.to_q", "attn2.to_k"), 640, 1024, "lora_A", "lora_B"),
    ),
    _foreign("Flux", "sd15", SD, KOHYA, _pair(QKV, 9216, 3072)),
    _foreign(
        "Stable Diffusion 1.5", "flux-dev", "Flux", KOHYA, _pair(Q_SD.replace("attn1_to_q", "attn2_to_k"), 640, 768)
    ),
    _foreign(
        XL, "flux-dev", "Flux", "diffusers", _pair("unet.add_embedding.linear_1", 1280, 2816, "lora.down", "lora.up")
    ),
    _foreign(
        "FLUX.2",
        "flux-dev",
        "Flux",
        "PEFT",
        _pair("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 55296, 6144, "lora_A", "lora_B"),
    ),
    _foreign("Stable Diffusion 3", "sdxl", XL, KOHYA, _pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536)),
    _foreign(
        "Wan",
        "flux-dev",
        "Flux",
        "ComfyUI's layout",
        _pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120, "lora_A", "lora_B"),
    ),
    _foreign(
        "Qwen-Image",
        "flux-dev",
        "Flux",
        "PEFT",
        _pair("transformer.transformer_blocks.0.img_mlp.net.2", 3072, 12288, "lora_A", "lora_B"),
    ),
    _foreign(
        "Chroma",
        "flux-dev",
        "Flux",
        "ComfyUI's layout",
        _pair("diffusion_model.distilled_guidance_layer.in_proj", 5120, 64, "lora_A", "lora_B"),
    ),
    _bad(
        "NaN",
        f"its '{Q_SD}.lora_down.weight' holds numbers that are not finite.",
        f"{Q_SD}.lora_down.weight",
        spoilt="NaN",
    ),
    _bad(
        "cut short",
        "its file cannot be read: Error while deserializing header: incomplete metadata, file not fully covered.",
        f"{Q_SD}.lora_down.weight",
        spoilt="cut",
    ),
    _bad(
        "one matrix of a pair",
        f"its '{Q_SD}' lacks the part lora_up.weight.",
        f"{Q_SD}.lora_down.weight",
        spoilt="half",
    ),
    _bad(
        "LyCORIS: GLoRA",
        f"it holds '{Q_SD}.a1.weight', which is no change of a layer that is known here.",
        f"{Q_SD}.a1.weight",
        {},
        odd={f"{Q_SD}.a1.weight": (1, 8)},
    ),
    _bad(
        "PEFT: OFT",
        f"it holds 'base_model.model.{Q_PATH}.oft_R.weight', which is no change of a layer that is known here.",
        f"base_model.model.{Q_PATH}.oft_R.weight",
        {},
        odd={f"base_model.model.{Q_PATH}.oft_R.weight": (2, 6)},
    ),
)
_WIDE = (
    "The embedding 'ink' cannot be used with this model: {} "
    "Take one that was trained for it, or leave its name out of the prompts."
)


def _embedding(kind: str, model: str, *tensors: tuple[str, int, int], **more: object) -> EmbeddingRow:
    shapes = {key: (vectors, width) for key, vectors, width in tensors}
    return EmbeddingRow(kind=kind, model=model, key=tensors[0][0], tensors=shapes, **more)  # type: ignore[arg-type]


EMBEDDINGS: tuple[EmbeddingRow, ...] = (
    _embedding("AUTOMATIC1111", "sd15", ("emb_params", 2, 0)),
    _embedding("AUTOMATIC1111, float16", "sd15", ("emb_params", 3, 0), dtype="float16"),
    _embedding("diffusers, the token as key", "sd15", ("<style>", 1, 0)),
    _embedding("ComfyUI", "sd15", ("clip_l", 2, 0)),
    _embedding("AUTOMATIC1111", "sd21", ("emb_params", 2, 0)),
    _embedding("kohya, OneTrainer: both encoders", "sdxl", ("clip_l", 2, 0), ("clip_g", 2, 0)),
    _embedding("Replicate: both encoders", "sdxl", ("text_encoders_0", 2, 0), ("text_encoders_1", 2, 0)),
    _embedding("in a LoRA (bundle_emb)", "sd15", ("bundle_emb.ink.string_to_param.*", 2, 0), bundled=True),
    _embedding(
        "in a LoRA of OneTrainer (bundle_emb)",
        "sdxl",
        ("bundle_emb.ink.clip_l", 2, 0),
        ("bundle_emb.ink.clip_g", 2, 0),
        bundled=True,
    ),
    _embedding(
        "made for SDXL",
        "sd15",
        ("clip_l", 2, 768),
        ("clip_g", 2, 1280),
        refused=True,
        said=_WIDE.format("it holds vectors for two text encoders, and this model has one."),
    ),
    _embedding(
        "made for Stable Diffusion 1.5",
        "sdxl",
        ("emb_params", 2, 768),
        refused=True,
        said=_WIDE.format("it does not hold vectors for this model's 2 text encoder(s)."),
    ),
    _embedding(
        "made for Stable Diffusion 2.1",
        "sd15",
        ("emb_params", 2, 1024),
        refused=True,
        said=_WIDE.format("its vectors have 1024 numbers, this model's words 16."),
    ),
    _embedding(
        "NaN",
        "sd15",
        ("emb_params", 2, 0),
        spoilt="NaN",
        refused=True,
        said=_WIDE.format("its vectors hold numbers that are not finite."),
    ),
    _embedding(
        "cut short",
        "sd15",
        ("emb_params", 2, 0),
        spoilt="cut",
        refused=True,
        said=_WIDE.format(
            "its file cannot be read: Error while deserializing header: incomplete metadata, file not fully covered."
        ),
    ),
)

FILES: tuple[FileRow, ...] = (*LORAS, *EMBEDDINGS)
