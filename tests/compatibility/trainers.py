"""The names that trainers have for layers, written down for a few layers of each model.

name → the layers whose rows the trainer's matrix has, in turn, `component:path` each.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    "output_blocks.2.1.transformer_blocks.0.attn1.to_k": f"{XL_UP}.0.attentions.2.transformer_blocks.0.attn1.to_k",
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


def block(block: str, *names: str) -> str:
    return " ".join(f"transformer:{block}.{name}" for name in names)


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
BFL = {
    "double_blocks.0.img_attn.qkv": block("transformer_blocks.0", *_QKV),
    "double_blocks.0.img_attn.proj": block("transformer_blocks.0", "attn.to_out.0"),
    "double_blocks.1.txt_attn.qkv": block(
        "transformer_blocks.1", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"
    ),
    "double_blocks.1.txt_attn.proj": block("transformer_blocks.1", "attn.to_add_out"),
    "double_blocks.0.img_mlp.0": block("transformer_blocks.0", "ff.net.0.proj"),
    "double_blocks.1.txt_mlp.2": block("transformer_blocks.1", "ff_context.net.2"),
    "double_blocks.0.img_mod.lin": block("transformer_blocks.0", "norm1.linear"),
    "double_blocks.1.txt_mod.lin": block("transformer_blocks.1", "norm1_context.linear"),
    "single_blocks.0.linear1": block("single_transformer_blocks.0", *_QKV, "proj_mlp"),
    "single_blocks.1.linear2": block("single_transformer_blocks.1", "proj_out"),
    "single_blocks.1.modulation.lin": block("single_transformer_blocks.1", "norm.linear"),
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
    "single_blocks.0.processor.qkv_lora": block("single_transformer_blocks.0", *_QKV),
    "single_blocks.1.processor.proj_lora": block("single_transformer_blocks.1", "proj_out"),
}


def flat(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {prefix + name.replace(".", "_"): targets for name, targets in names.items()}


def dotted(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {prefix + name: targets for name, targets in names.items()}


def of(component: str, paths: tuple[str, ...], inner: str = "") -> dict[str, str]:
    """As in the model; `inner`: a level that files have and transformers 5 has not."""
    return {inner + path: f"{component}:{path}" for path in paths}


def old(names: Mapping[str, str]) -> dict[str, str]:
    """diffusers' attention processors, and text encoders in their words."""
    words = {".to_q": ".processor.to_q_lora", ".to_k": ".processor.to_k_lora", ".to_v": ".processor.to_v_lora"}
    words |= {".to_out.0": ".processor.to_out_lora", ".q_proj": ".to_q_lora", ".out_proj": ".to_out_lora"}
    ends = {name: next((end for end in words if name.endswith(end)), "") for name in names}
    return {name.removesuffix(end) + words[end]: names[name] for name, end in ends.items() if end}


MODEL = "text_model."
SD_UNET, SD_TEXT = of("unet", UNET), of("text_encoder", CLIP, MODEL)
XL_TEXTS = (SD_TEXT, of("text_encoder_2", CLIP, MODEL))
FLUX_UNET = of("transformer", FLUX)
KOHYA_SD = flat("lora_unet_", SD_UNET) | flat("lora_te_", SD_TEXT)
KOHYA_XL = flat("lora_unet_", SGM) | flat("lora_te1_", XL_TEXTS[0]) | flat("lora_te2_", XL_TEXTS[1])
KOHYA_FLUX = flat("lora_unet_", BFL)
PIPELINE_SD = dotted("unet.", SD_UNET) | dotted("text_encoder.", SD_TEXT)
PIPELINE_XL = (
    dotted("unet.", of("unet", ("down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", *UNET[:5])))
    | dotted("text_encoder.", XL_TEXTS[0])
    | dotted("text_encoder_2.", XL_TEXTS[1])
)
LIGHTNING = flat("lora_unet_", of("unet", (*UNET, *CONVOLUTIONS, *EMBEDDERS)))
ADDED = flat("lora_unet_", of("unet", ("add_embedding.linear_1", "add_embedding.linear_2", *UNET, *EMBEDDERS)))
SETTINGS = '{"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 2}, "text_encoder.lora_alpha": 6}'
Q_SD = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
Q_XL = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
Q_PATH = f"{ATTENTION}.attn1.to_q"
LYCORIS = "LyCORIS (kohya)"
