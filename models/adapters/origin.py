"""Which trainer wrote a LoRA's file, and for which family of models: what a refusal says of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_TRAINERS = (
    (r"double_blocks\.\d+\.processor|single_blocks\.\d+\.processor", "XLabs"),
    (r"^lora_transformer_", "OneTrainer"),
    (r"^lycoris_|\.hada_|\.lokr_|\.oft_blocks", "LyCORIS"),
    (r"^lora_(unet|te\d?)_", "kohya's sd-scripts"),
    (r"^(diffusion_model|text_encoders)\.", "ai-toolkit or ComfyUI"),
    (r"\.lora_[AB]\.", "PEFT"),
    (r"[._]lora\.(down|up)\.|lora_linear_layer", "diffusers"),
)
_IN_HEADER = (("ot_", "OneTrainer"), ("ai-toolkit", "ai-toolkit"), ("SimpleTuner", "SimpleTuner"))
# Of names with underscores for dots; the first that is found decides.
_FAMILIES = (
    (r"distilled_guidance_layer", "Chroma"),
    (r"(key|query)_norm_scale$", "Flux with a control picture"),  # Black Forest Labs' depth and canny
    (r"to_qkv_mlp_proj|double_stream_modulation", "FLUX.2"),
    (r"individual_token_refiner", "HunyuanVideo"),
    (r"(double|single)_stream_blocks_", "HiDream"),
    (r"joint_blocks_", "Stable Diffusion 3"),
    (r"(noise|context)_refiner_", "Z-Image or Lumina 2"),
    (r"transformer_blocks_\d+_(img|txt)_(mod|mlp)_", "Qwen-Image"),
    (r"blocks_\d+_(self|cross)_attn_", "Wan"),
    (r"lora_prior_", "Stable Cascade"),
    (r"double_blocks_|single_blocks_|single_transformer_blocks_|transformer_blocks_\d+_attn_", "Flux"),
    (r"(lora_te2|text_encoder_2|clip_g_transformer)_text_model|label_emb|add_embedding", "SDXL"),
    (r"(attentions_\d+|blocks_\d+_1|middle_block_1)_transformer_blocks_[1-9]", "SDXL"),
)
_BY_TEXT_WIDTH = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2.1", 2048: "SDXL", 1280: "the SDXL refiner"}

_PIPELINES = {  # by how diffusers' classes begin
    "StableDiffusionXL": "SDXL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux2": "FLUX.2",
    "Flux": "Flux",
    "Chroma": "Chroma",
    "QwenImage": "Qwen-Image",
    "ZImage": "Z-Image or Lumina 2",
}


def trainer(keys: Iterable[str], header: Mapping[str, str]) -> str:
    """By the file's own word, else by how it spells its keys."""
    said = " ".join((*header, header.get("software", ""), header.get("modelspec.author", "")))
    for mark, name in _IN_HEADER:
        if re.search(rf"(?:^|\W){re.escape(mark)}", said):
            return name
    return next((name for mark, name in _TRAINERS if any(re.search(mark, key) for key in keys)), "an unknown trainer")


def family(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Of the model that a file was made for, by its layers' names and the shapes (rank, in) of its down matrices."""
    flat = {name.replace(".", "_"): shape for name, shape in shapes.items()}
    for mark, name in _FAMILIES:
        if any(re.search(mark, one) for one in flat):
            return name
    widths = [shape[1] for name, shape in flat.items() if name.endswith("attn2_to_k") and len(shape) > 1]
    if any("attn2" in name or "input_blocks" in name or "down_blocks" in name for name in flat):
        return next((_BY_TEXT_WIDTH[width] for width in widths if width in _BY_TEXT_WIDTH), "Stable Diffusion 1 or 2")
    return None


def family_of(pipeline: Any) -> str:
    """Of a loaded model."""
    kind = type(pipeline).__name__
    for mark, name in _PIPELINES.items():
        if kind.startswith(mark):
            return name
    return _BY_TEXT_WIDTH.get(pipeline.unet.config.cross_attention_dim, "Stable Diffusion 1 or 2")
