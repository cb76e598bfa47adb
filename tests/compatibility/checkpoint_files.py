"""Kinds of checkpoint, as data: `test_checkpoints.py` writes them at small width and loads them, or is refused."""

from __future__ import annotations

from tests.compatibility.checkpoint_rows import MISSING, PARTS, CheckpointRow
from tests.compatibility.checkpoint_rows import loose as _loose
from tests.compatibility.checkpoint_rows import part as _part
from tests.compatibility.checkpoint_rows import refused as _refused
from tests.compatibility.checkpoint_rows import served as _served
from tests.compatibility.layouts import (
    INPUT,
    NORM,
    TEXT,
    UNET,
    autoencoder,
    clip_l,
    flux,
    flux_of_diffusers,
    flux_whole,
    holding,
    in_folders,
    only,
    renamed,
    sdxl_of_comfyui,
    t5,
    velocity,
    whole_clip,
    whole_open_clip,
    widened,
    with_ema,
    with_last_layer,
    with_leftovers,
    without,
)
from tests.models.original import clip, stable_diffusion

Q = "double_blocks.0.img_attn.qkv.weight"
SCALE = "double_blocks.0.img_attn.qkv.scale_weight"


def _in_one(family: str) -> str:
    return f"is a {family} as one file, which is not served here: bring its diffusers folder"


FORMATS = "Take a file in fp8, scaled fp8, 16 bit, or GGUF"
COMFYUI = (
    (UNET, "diffusion_model."),
    ("first_stage_model.", "vae."),
    ("cond_stage_model.transformer.", "text_encoders.clip_l.transformer."),
)
OLD_CLIP = ((TEXT, TEXT.removesuffix("text_model.")),)
SD = "as first published"
FROM_PICTURE = (
    "is a model that draws from a picture, as InstructPix2Pix (its UNet takes 8 channels), which is not served here"
)
VISION = "vision_model.encoder.layers.23.self_attn.q_proj.weight"
UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"

CHECKPOINTS: tuple[CheckpointRow, ...] = (
    _served(SD, "sd15", stable_diffusion, INPUT, drawn=True),
    _served(SD, "sd15", stable_diffusion, INPUT, "F32"),
    _served(SD, "sd15", stable_diffusion, INPUT, "BF16"),
    _served(SD, "sd15", stable_diffusion, INPUT, "fp8 e4m3fn"),
    _served(SD, "sd15", stable_diffusion, INPUT, "fp8 e5m2"),
    _served(SD, "sd15", stable_diffusion, f"{UNET}time_embed.0.scale_weight", "scaled fp8"),
    _served(SD, "sd15", stable_diffusion, f"{UNET}time_embed.0.comfy_quant", "scaled fp8 in its newer names"),
    _served("with the averages of training (EMA)", "sd15", with_ema, "model_ema.decay", "F32"),
    _served("with what training left", "sd15", with_leftovers, "sqrt_alphas_cumprod"),
    _served(
        "its text encoder in the names of an old transformers",
        "sd15",
        renamed(stable_diffusion, *OLD_CLIP),
        "cond_stage_model.transformer.embeddings.token_embedding.weight",
    ),
    _served(
        "under ComfyUI's prefixes",
        "sd15",
        renamed(stable_diffusion, *COMFYUI),
        "diffusion_model.input_blocks.0.0.weight",
    ),
    _served(
        "pruned of its autoencoder",
        "sd15",
        without(stable_diffusion, "first_stage_model."),
        INPUT,
        beside={"vae4": "F16"},
    ),
    _served(
        "pruned of its text encoder",
        "sd15",
        without(stable_diffusion, "cond_stage_model."),
        INPUT,
        beside={"clip_l": "F16"},
    ),
    _served(
        "the UNet alone",
        "sd15",
        only(stable_diffusion, UNET),
        "input_blocks.0.0.weight",
        "GGUF Q8_0",
        {"clip_l": "F16", "vae4": "F16"},
    ),
    _served(
        "its text encoder a whole CLIP-L, with what sees",
        "sd15",
        without(stable_diffusion, "cond_stage_model."),
        INPUT,
        beside={"clip_l": "F16"},
        others={"clip_l": whole_clip},
    ),
    _served("a diffusers folder, its variant fp16", "sd15", in_folders, "unet/conv_in.weight"),
    _served("as first published", "sd21", with_last_layer, INPUT, drawn=True),
    _served(
        "768-v, told by its weights",
        "sd21",
        velocity,
        UNET + NORM,
        prediction="v_prediction",
    ),
    _served(
        "768-v, told by its metadata",
        "sd21",
        stable_diffusion,
        INPUT,
        header={"modelspec.prediction_type": "v"},
        prediction="v_prediction",
    ),
    _served(SD, "sdxl", stable_diffusion, "conditioner.embedders.1.model.ln_final.weight", drawn=True),
    _served(
        "SDXL Turbo, told by its metadata",
        "sdxl",
        stable_diffusion,
        INPUT,
        header={"modelspec.title": "SDXL Turbo"},
        scheduler="EulerDiscreteScheduler",
    ),
    _served(
        "a latent consistency model without an embedded scale, told by its metadata",
        "sd15",
        stable_diffusion,
        INPUT,
        header={"modelspec.tags": "LCM"},
        scheduler="LCMScheduler",
    ),
    _served(
        "predicts velocities (v_pred)",
        "sdxl",
        holding({"v_pred": (0,)}, stable_diffusion),
        "v_pred",
        prediction="v_prediction",
    ),
    _served(
        "predicts velocities and ends in pure noise (v_pred, ztsnr)",
        "sdxl",
        holding({"v_pred": (0,), "ztsnr": (0,)}, stable_diffusion),
        "ztsnr",
        prediction="v_prediction",
        terminal_snr=True,
    ),
    _served(
        "under ComfyUI's prefixes",
        "sdxl",
        sdxl_of_comfyui,
        "text_encoders.clip_g.transformer.text_model.final_layer_norm.weight",
    ),
    _served(SD, "sdxl-refiner", stable_diffusion, "conditioner.embedders.0.model.ln_final.weight"),
    _served("the transformer alone", "flux-dev", flux, Q, "F16", PARTS),
    _served("the transformer alone", "flux-dev", flux, Q, "BF16", {**PARTS, "vae16": "BF16"}),
    _served("the transformer alone", "flux-dev", flux, Q, "fp8 e4m3fn", {**PARTS, "t5": "fp8 e4m3fn"}),
    _served("the transformer alone", "flux-dev", flux, Q, "fp8 e5m2", PARTS),
    _served("the transformer alone", "flux-dev", flux, SCALE, "scaled fp8", {**PARTS, "t5": "scaled fp8"}),
    _served("the transformer alone", "flux-dev", flux, Q, "GGUF Q8_0", PARTS, drawn=True),
    _served("the transformer alone", "flux-dev", flux, Q, "GGUF Q5_1", PARTS),
    _served("the transformer alone", "flux-dev", flux, Q, "GGUF Q4_0", {**PARTS, "t5": "fp8 e4m3fn"}),
    _served(
        "the transformer alone, T5's words under the encoder's name alone",
        "flux-dev",
        flux,
        Q,
        "BF16",
        {**PARTS, "t5": "BF16"},
        others={"t5": without(t5, "shared.")},
    ),
    _served("the transformer in diffusers' names", "flux-dev", flux_of_diffusers, "x_embedder.weight", "BF16", PARTS),
    _served("everything in one file, of ComfyUI", "flux-dev", flux_whole, UNET + Q, "fp8 e4m3fn"),
    _served("the transformer alone", "flux-schnell", flux, Q, "BF16", PARTS),
    _served("for filling, the transformer alone", "flux-fill", flux, "img_in.weight", "BF16", PARTS),
    _served("for inpainting", "sd15", widened(9), INPUT),
    _served("for inpainting", "sd21", widened(9), INPUT),
    _served("for inpainting", "sdxl", widened(9), INPUT),
    _refused(
        "Stable Diffusion 1.5 without its autoencoder, and none beside",
        "sd15",
        without(stable_diffusion, "first_stage_model."),
        INPUT,
        f"lacks an autoencoder of Stable Diffusion: {MISSING}, or name it as `vae` in the models file",
    ),
    _refused(
        "Flux's transformer, and nothing beside",
        "flux-dev",
        flux,
        Q,
        f"lacks a text encoder CLIP-L and a text encoder T5-XXL and an autoencoder of 16 channels (Flux's): {MISSING}, "
        "or name it as `text_encoder` and `text_encoder_2` and `vae` in the models file",
    ),
    _refused(
        "InstructPix2Pix",
        "sd15",
        widened(8),
        INPUT,
        FROM_PICTURE,
    ),
    _refused("InstructPix2Pix of SDXL", "sdxl", widened(8), INPUT, FROM_PICTURE),
    _refused(
        "Stable Diffusion's upscaler (x4)",
        "sd21",
        widened(7),
        INPUT,
        "is Stable Diffusion's upscaler (its UNet takes 7 channels), which is not served here",
    ),
    _refused(
        "Stable Video Diffusion",
        "sd21",
        holding({f"{UNET}input_blocks.1.1.time_stack.0.attn1.to_q.weight": (320, 320)}, widened(8)),
        f"{UNET}input_blocks.1.1.time_stack.0.attn1.to_q.weight",
        "is a video model, which is not served here",
    ),
    _refused(
        "Stable Diffusion 2.1 unCLIP",
        "sd21",
        holding({f"{UNET}label_emb.0.0.weight": (1280, 2048), "noise_augmentor.betas": (1000,)}, stable_diffusion),
        f"{UNET}label_emb.0.0.weight",
        "is an unCLIP of Stable Diffusion 2 (its UNet takes a picture's embedding), not served here",
    ),
    _refused(
        "Stable Diffusion 2 with depth",
        "sd21",
        widened(5),
        INPUT,
        "is a Stable Diffusion 2 with depth (its UNet takes 5 channels), which is not served here",
    ),
    _refused(
        "a latent consistency model",
        "sd15",
        holding({f"{UNET}time_embed.cond_proj.weight": (320, 256)}, stable_diffusion),
        f"{UNET}time_embed.cond_proj.weight",
        "is a latent consistency model as one file, which is not served here: bring its diffusers folder",
    ),
    _refused(
        "SDXL with fewer layers, as SSD-1B",
        "sdxl",
        lambda made: {name: of for name, of in stable_diffusion(made).items() if ".transformer_blocks.9." not in name},
        INPUT,
        "has a UNet of 1560 tensors, and the published one of sdxl has 1680: layers were taken out or added. Give it "
        "in the models file, with a folder of its configurations under `config`",
    ),
    _refused(
        "Playground 2.5",
        "sdxl",
        holding({"edm_mean": (4,)}, stable_diffusion),
        "edm_mean",
        "was trained in EDM's parametrisation (its keys say so), which no sampler here has",
    ),
    _refused(
        "Flux for edges",
        "flux-dev",
        holding({"img_in.weight": (3072, 128)}, flux),
        "img_in.weight",
        "is a Flux for depth or edges (it takes 128 numbers a token), not served here",
    ),
    _refused(
        "Chroma",
        "flux-schnell",
        holding({"distilled_guidance_layer.in_proj.weight": (5120, 64)}, flux),
        "distilled_guidance_layer.in_proj.weight",
        _in_one("Chroma"),
    ),
    _loose(
        "Stable Diffusion 3",
        _in_one("Stable Diffusion 3"),
        {"joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
    ),
    _loose("Qwen-Image", _in_one("Qwen-Image"), {"txt_norm.weight": (3584,), "img_in.weight": (3072, 64)}),
    _refused(
        "Flux in bitsandbytes' NF4",
        "flux-dev",
        holding({f"{UNET}{Q}.absmax": (9216,), f"{UNET}{Q}.quant_map": (16,)}, flux_whole),
        f"{UNET}{Q}.absmax",
        f"holds {UNET}{Q}.absmax, a part of a quantisation that is not supported. {FORMATS}",
    ),
    _loose(
        "Flux in nunchaku's SVDQuant",
        f"is in nunchaku's SVDQuant, a quantisation that is not supported. {FORMATS}",
        {
            "transformer_blocks.0.qkv_proj.qweight": (9216, 1536),
            "transformer_blocks.0.qkv_proj.wscales": (48, 9216),
            "transformer_blocks.0.qkv_proj.lora_down": (3072, 32),
        },
    ),
    _refused(
        "a UNet in diffusers' names",
        "sd15",
        lambda made: made.unet.state_dict(),
        "conv_in.weight",
        "is a UNet in diffusers' names without its other networks: bring its whole folder",
    ),
    _part("vae4", "sd15", autoencoder, "decoder.conv_in.weight"),
    _part("vae16", "flux-dev", autoencoder, "decoder.conv_in.weight"),
    _part("clip_l", "sd15", clip_l, "text_model.embeddings.token_embedding.weight"),
    _part("clip_g", "sdxl", lambda made: clip(made.text_encoder_2), "text_model.encoder.layers.31.layer_norm1.weight"),
    _part("t5", "flux-dev", t5, "encoder.block.0.layer.0.SelfAttention.q.weight"),
    _part("clip_l", "sd15", whole_clip, VISION, "CLIP-L whole, with what sees"),
    _part("clip_h", "sd21", whole_open_clip, "visual.conv1.weight", "OpenCLIP-H whole, with what sees"),
    _loose("CLIP's vision encoder", "is CLIP's vision encoder, which is not served here", {VISION: (1024, 1024)}),
    _loose(
        "an IP-Adapter",
        "is an IP-Adapter, which is not served here",
        {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)},
    ),
    _loose("a T2I-Adapter", "is a T2I-Adapter, which is not served here", {"body.0.block1.weight": (320, 320, 3, 3)}),
    _refused(
        "a UMT5",
        "flux-dev",
        holding({UMT5: (32, 64)}, t5),
        UMT5,
        "is a text encoder UMT5, of a family that is not served here",
    ),
    _refused(
        "a T5 in pieces, the first",
        "flux-dev",
        without(t5, "encoder.final_layer_norm"),
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "is none of the kinds of files that are known here",
    ),
    _loose(
        "a T5 in llama.cpp's names",
        "is a text encoder T5 in llama.cpp's names: take it as safetensors, in fp8, scaled fp8 or 16 bit",
        {"enc.blk.0.attn_k.weight": (4096, 4096), "token_embd.weight": (32128, 4096)},
    ),
    _loose(
        "kohya's LoRA",
        "is a LoRA: put it into the folder of LoRAs",
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 320)},
    ),
    _loose(
        "PEFT's LoRA", "is a LoRA: put it into the folder of LoRAs", {"transformer.x_embedder.lora_A.weight": (4, 64)}
    ),
    _loose("a LoHa", "is a LoRA: put it into the folder of LoRAs", {"lora_unet_conv_in.hada_w1_a": (4, 320)}),
    _loose("an embedding", "is an embedding: put it into the folder of embeddings", {"emb_params": (4, 768)}),
    _loose(
        "an embedding of SDXL",
        "is an embedding: put it into the folder of embeddings",
        {"clip_l": (2, 768), "clip_g": (2, 1280)},
    ),
    _loose(
        "a ControlNet",
        "is a ControlNet, which is not served here",
        {"control_model.time_embed.0.weight": (1280, 320)},
    ),
    _loose("an upscaler", "is an upscaler, which is no model by itself", {"conv_first.weight": (64, 3, 3, 3)}),
    _refused(
        "a second denoiser in the file",
        "sd15",
        holding({"another_model.weight": (2, 2)}, stable_diffusion),
        "another_model.weight",
        "holds 1 tensors that belong to no network known here, 'another_model.weight' first",
    ),
    _loose(
        "a UNet without most of it",
        "lacks a tensor that every model of its kind has: 'proj_in.weight'",
        {INPUT: (320, 4, 3, 3)},
    ),
    _loose("something else", "is none of the kinds of files that are known here", {"layer.weight": (2, 2)}),
    _loose("a header and nothing more", "holds no tensors", {}),
)
