"""Tiny random pipelines of Stable Diffusion 3.5, Chroma and Qwen-Image, saved by diffusers."""

from __future__ import annotations

from pathlib import Path
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
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from models.libraries import quiet
from tests.models.conftest import TEXT_WIDTH, autoencoder, clip_config, t5

JOINT = 48  # numbers of a token of SD3's text: of both CLIPs, and of T5


def save_sd3(folder: Path, *, dual: bool = False, reads: bool = True) -> Path:
    """dual: 3.5 medium's second attention of the image to itself. reads: with T5."""
    config, tokenizer = clip_config(projection_dim=TEXT_WIDTH)
    wide, _ = clip_config(hidden_size=24, hidden_act="gelu", projection_dim=20)
    t5_encoder, t5_tokenizer = t5(JOINT)
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, 0.1),  # its pipeline for inpainting takes no other number
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(wide),
        tokenizer_2=tokenizer,
        text_encoder_3=t5_encoder if reads else None,
        tokenizer_3=t5_tokenizer if reads else None,
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=16,
            out_channels=16,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=JOINT,
            caption_projection_dim=16,
            pooled_projection_dim=TEXT_WIDTH + 20,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
            dual_attention_layers=(0, 1) if dual else (),
        ),
    ).save_pretrained(folder)
    return folder


def save_chroma(folder: Path) -> Path:
    encoder, tokenizer = t5(TEXT_WIDTH)
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(4, 0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
    ).save_pretrained(folder)
    return folder


def qwen25_vl() -> tuple[Any, Qwen2Tokenizer]:
    """The language model with its eyes, and its tokenizer with a token for each byte."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {word: at for at, word in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=eyes)
    return Qwen2_5_VLForConditionalGeneration(config), tokenizer


def save_qwen_image(folder: Path) -> Path:
    encoder, tokenizer = qwen25_vl()
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 2, 2],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.7, 2.0, 1.0],
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
    ).save_pretrained(folder)
    return folder


def save_all(folder: Path) -> dict[str, Path]:
    """Family name → folder; `sd3.5, medium` is of another shape, and reads without T5."""
    torch.manual_seed(4)
    with quiet():
        return {
            "sd3.5": save_sd3(folder / "sd3.5"),
            "sd3.5, medium": save_sd3(folder / "medium", dual=True, reads=False),
            "chroma": save_chroma(folder / "chroma"),
            "qwen-image": save_qwen_image(folder / "qwen-image"),
        }
