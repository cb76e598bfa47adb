"""Stable Diffusion 3.5, Chroma and Qwen-Image in the sizes that they were published in, as geometries.py has others."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from models.libraries import quiet

from .geometries import Geometry, autoencoder, clip, clip_tokenizer, on_cpu, t5

AXES = (16, 56, 56)


def sd35(layers: int, heads: int, dual: int, side: int) -> StableDiffusion3Pipeline:
    """dual: so many of the first blocks attend twice. side: of the table of positions."""
    tokenizer = clip_tokenizer()
    encoder, t5_tokenizer = t5(256)
    width = 64 * heads
    transformer = SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=4096,
        caption_projection_dim=width,
        pooled_projection_dim=2048,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(dual)),
    )
    positions = on_cpu(torch.zeros, size=(1, side**2, width), dtype=torch.bfloat16)  # no weights, and long to compute
    transformer.pos_embed.register_buffer("pos_embed", positions)
    return StableDiffusion3Pipeline(
        scheduler=on_cpu(FlowMatchEulerDiscreteScheduler, shift=3.0),
        vae=autoencoder(16, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609, **WITHOUT_CONVOLUTIONS),
        text_encoder=clip(CLIPTextModelWithProjection, 768, 12, 12),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, 32, 20, hidden_act="gelu", projection_dim=1280),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=t5_tokenizer,
        transformer=transformer,
    )


def chroma() -> ChromaPipeline:
    encoder, tokenizer = t5(512)
    with quiet():
        transformer = ChromaTransformer2DModel()
    embeddings = 3 * 38 + 2 * 6 * 19 + 2
    transformer.time_text_embed = on_cpu(ChromaCombinedTimestepTextProjEmbeddings, num_channels=16, out_dim=embeddings)
    return ChromaPipeline(
        scheduler=on_cpu(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, **WITHOUT_CONVOLUTIONS),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def qwen_image() -> QwenImagePipeline:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {word: at for at, word in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=131072)
    transformer = QwenImageTransformer2DModel()
    transformer.pos_embed = on_cpu(QwenEmbedRope, theta=10000, axes_dim=list(AXES), scale_rope=True)
    text: dict[str, Any] = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    eyes = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return QwenImagePipeline(
        scheduler=on_cpu(FlowMatchEulerDiscreteScheduler, shift=1.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=eyes, tie_word_embeddings=False)
        ),
        tokenizer=tokenizer,
        transformer=transformer,
    )


WITHOUT_CONVOLUTIONS = {"use_quant_conv": False, "use_post_quant_conv": False}
SD35_LARGE = Geometry("sd3.5-large", "sd3.5", 1024, 1024, torch.bfloat16, 3.5, lambda: sd35(38, 38, 0, 192))
SD35_MEDIUM = Geometry("sd3.5-medium", "sd3.5", 1024, 1024, torch.bfloat16, 4.5, lambda: sd35(24, 24, 13, 384))
CHROMA = Geometry("chroma", "chroma", 1024, 1024, torch.bfloat16, 3.0, chroma)
QWEN_IMAGE = Geometry("qwen-image", "qwen-image", 1328, 1328, torch.bfloat16, 4.0, qwen_image)
JOINT = (SD35_MEDIUM, SD35_LARGE, CHROMA, QWEN_IMAGE)
