"""Kinds of LoRA, as data: `adapters.py` writes them, `test_adapters.py` draws, the page shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.compatibility.rows import FileRow, Group
from tests.compatibility.trainers import (
    ADDED,
    ATTENTION,
    BFL,
    BFL_ENDS,
    CONVOLUTIONS,
    DIFFUSERS,
    EMBEDDERS,
    FLUX_ENDS,
    FLUX_UNET,
    KOHYA_FLUX,
    KOHYA_SD,
    KOHYA_XL,
    LIGHTNING,
    LINEAR_LAYER,
    LYCORIS,
    PEFT,
    PIPELINE_SD,
    PIPELINE_XL,
    Q_PATH,
    Q_SD,
    Q_XL,
    QKV,
    SD_LDM,
    SD_TEXT,
    SD_UNET,
    SETTINGS,
    SGM,
    SGM_CONVOLUTIONS,
    T5,
    UNET,
    XL_TEXTS,
    XLABS,
    XLABS_DOUBLE,
    XLABS_SINGLE,
    dotted,
    flat,
    of,
    old,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRow(FileRow):
    """`layers`: as in `trainers.py`.

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
    _lora("kohya: text encoder alone", "sd15", flat("lora_te_", SD_TEXT)),
    _lora("kohya with conv_dim (LoCon)", "sd15", flat("lora_unet_", of("unet", CONVOLUTIONS))),
    _lora(f"{LYCORIS}: LoCon with a core tensor", "sd15", flat("lora_unet_", of("unet", CONVOLUTIONS[:1])), "mid"),
    _lora(f"{LYCORIS}: LoHa", "sd15", KOHYA_SD, "loha"),
    _lora(f"{LYCORIS}: LoHa of convolutions", "sd15", flat("lora_unet_", of("unet", CONVOLUTIONS)), "loha"),
    _lora(
        f"{LYCORIS}: LoHa with core tensors", "sd15", flat("lora_unet_", of("unet", CONVOLUTIONS[:1])), "loha tucker"
    ),
    _lora(f"{LYCORIS}: LoKr, whole factors", "sd15", KOHYA_SD, "lokr"),
    _lora(f"{LYCORIS}: LoKr, factors of low rank", "sd15", KOHYA_SD, "lokr low-rank"),
    _lora(f"{LYCORIS}: LoKr of convolutions", "sd15", flat("lora_unet_", of("unet", CONVOLUTIONS)), "lokr"),
    _lora(
        f"{LYCORIS}: LoKr with a core tensor", "sd15", flat("lora_unet_", of("unet", CONVOLUTIONS[:1])), "lokr tucker"
    ),
    _lora("kohya: OFT", "sd15", flat("oft_unet_", SD_UNET), "oft"),
    _lora(f"{LYCORIS}: diagonal OFT, rescaled", "sd15", KOHYA_SD, "oft rescaled"),
    _lora(f"{LYCORIS}: BOFT", "sd15", flat("lora_unet_", SD_UNET), "boft"),
    _lora(f"{LYCORIS}: DoRA, a norm for each output", "sd15", KOHYA_SD, "dora"),
    _lora(f"{LYCORIS}: DoRA, a norm for each input", "sd15", KOHYA_SD, "dora by input"),
    _lora("PEFT: DoRA (use_dora)", "sd15", PIPELINE_SD, "dora", PEFT),
    _lora(f"{LYCORIS}: whole differences with biases", "sd15", KOHYA_SD, "whole"),
    _lora(
        f"{LYCORIS}: norms",
        "sd15",
        flat("lora_unet_", of("unet", ("mid_block.resnets.0.norm1", f"{ATTENTION}.norm2"))),
        "norm",
    ),
    _lora("diffusers, attention processors", "sd15", dotted("unet.", old(SD_UNET)), "lora", XLABS),
    _lora("diffusers, attention processors of a bare UNet", "sd15", old(SD_UNET), "lora", XLABS),
    _lora(
        "diffusers, attention processors: text encoder", "sd15", dotted("text_encoder.", old(SD_TEXT)), "lora", XLABS
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
    _lora("PEFT, a bare UNet", "sd15", dotted("base_model.model.", SD_UNET), "lora", PEFT),
    _lora("LCM-LoRA, Lightning, Hyper: embedders and convolutions too", "sd15", LIGHTNING),
    _lora("ComfyUI, extracted", "sd15", dotted("diffusion_model.", SD_LDM)),
    _lora("ComfyUI: text encoder", "sd15", dotted("text_encoders.clip_l.transformer.", SD_TEXT)),
    _lora("kohya --v2", "sd21", KOHYA_SD),
    _lora("diffusers, by PEFT", "sd21", PIPELINE_SD, "lora", PEFT),
    _lora("ComfyUI: text encoder", "sd21", dotted("text_encoders.clip_h.transformer.", SD_TEXT)),
    _lora("kohya: UNet and both text encoders", "sdxl", KOHYA_XL),
    _lora("kohya with conv_dim, embedders and label_emb", "sdxl", flat("lora_unet_", SGM_CONVOLUTIONS)),
    _lora(f"{LYCORIS}: LoHa", "sdxl", KOHYA_XL, "loha"),
    _lora(f"{LYCORIS}: LoKr", "sdxl", KOHYA_XL, "lokr"),
    _lora(f"{LYCORIS}: DoRA", "sdxl", KOHYA_XL, "dora by input"),
    _lora("OneTrainer, with add_embedding", "sdxl", ADDED),
    _lora("LCM-LoRA, Lightning, Hyper", "sdxl", flat("lora_unet_", of("unet", (*UNET[:5], *EMBEDDERS)))),
    _lora("diffusers, before PEFT", "sdxl", PIPELINE_XL, "lora", DIFFUSERS, LINEAR_LAYER),
    _lora("diffusers, by PEFT", "sdxl", PIPELINE_XL, "lora", PEFT),
    _lora("ComfyUI, extracted", "sdxl", dotted("diffusion_model.", SGM | SGM_CONVOLUTIONS)),
    _lora(
        "ComfyUI: both text encoders",
        "sdxl",
        dotted("text_encoders.clip_l.transformer.", XL_TEXTS[0])
        | dotted("text_encoders.clip_g.transformer.", XL_TEXTS[1]),
    ),
    _lora("kohya: fused attention, MLP, modulation", "flux-dev", KOHYA_FLUX),
    _lora("kohya: embedders and final layer", "flux-dev", KOHYA_FLUX | flat("lora_unet_", BFL_ENDS)),
    _lora(
        "kohya: CLIP and T5",
        "flux-dev",
        flat("lora_te1_", SD_TEXT) | flat("lora_te3_", of("text_encoder_2", T5)) | KOHYA_FLUX,
    ),
    _lora(
        "kohya, of Flux dev, on Flux schnell",
        "flux-schnell",
        KOHYA_FLUX | flat("lora_unet_", {name: of for name, of in BFL_ENDS.items() if "guidance" not in name}),
        odd=_pair("lora_unet_guidance_in_in_layer", 16, 256),
        said=UNPLACED.format("1 of the 19", "lora_unet_guidance_in_in_layer"),
    ),
    _lora("ai-toolkit, diffusers by PEFT", "flux-dev", dotted("transformer.", FLUX_UNET), "lora", PEFT),
    _lora(
        "diffusers by PEFT: embedders and final layer",
        "flux-dev",
        dotted("transformer.", of("transformer", FLUX_ENDS)),
        "lora",
        PEFT,
    ),
    _lora("SimpleTuner, PEFT with alphas", "flux-dev", dotted("transformer.", FLUX_UNET), "lora alpha", PEFT),
    _lora("PEFT, a bare transformer", "flux-dev", dotted("base_model.model.", FLUX_UNET), "lora", PEFT),
    _lora("ai-toolkit, SimpleTuner: LoKr", "flux-dev", flat("lycoris_", FLUX_UNET), "lokr"),
    _lora(
        "OneTrainer",
        "flux-dev",
        flat("lora_transformer_", FLUX_UNET) | flat("lora_te1_", SD_TEXT) | flat("lora_te2_", of("text_encoder_2", T5)),
    ),
    _lora("OneTrainer: DoRA", "flux-dev", flat("lora_transformer_", FLUX_UNET), "dora by input"),
    _lora("XLabs", "flux-dev", XLABS_DOUBLE | XLABS_SINGLE, "lora", XLABS),
    _lora("XLabs: double blocks alone", "flux-dev", XLABS_DOUBLE, "lora", XLABS),
    _lora("ComfyUI, ai-toolkit", "flux-dev", dotted("diffusion_model.", BFL), "lora", PEFT),
    _lora(
        "ComfyUI, extracted: CLIP and T5 too",
        "flux-dev",
        dotted("diffusion_model.", BFL | BFL_ENDS)
        | dotted("text_encoders.clip_l.transformer.", SD_TEXT)
        | dotted("text_encoders.t5xxl.transformer.", of("text_encoder_2", T5)),
    ),
    _lora("fal's trainers", "flux-dev", dotted("base_model.model.", BFL | BFL_ENDS), "lora", PEFT),
    _lora(f"{LYCORIS}: LoHa of fused layers", "flux-dev", KOHYA_FLUX, "loha"),
    _lora(f"{LYCORIS}: DoRA of fused layers", "flux-dev", KOHYA_FLUX, "dora by input"),
    _lora(f"{LYCORIS}: diagonal OFT of fused layers", "flux-dev", KOHYA_FLUX | flat("lora_unet_", BFL_ENDS), "oft"),
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
        "ai-toolkit or ComfyUI",
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
        "ai-toolkit or ComfyUI",
        _pair("diffusion_model.distilled_guidance_layer.in_proj", 5120, 64, "lora_A", "lora_B"),
    ),
    _foreign(
        "Flux with a control picture",
        "flux-dev",
        "Flux",
        "PEFT",
        {**_pair("img_in", 3072, 128, "lora_A", "lora_B"), "double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
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
