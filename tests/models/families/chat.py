"""Tiny random pipelines of the families whose text a language model reads as a chat, saved by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from tests.models.conftest import TEXT_WIDTH, autoencoder

TEXT_LENGTH = 96
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)  # as Qwen3's, for one message


def qwen3(kind: Any, layers: int) -> tuple[Any, Qwen2Tokenizer]:
    """The language model, and its tokenizer with a token for each byte."""
    vocabulary = {word: at for at, word in enumerate([*sorted(ByteLevel.alphabet()), *SPECIAL])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH, chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return kind(config), tokenizer


def save_flux2(folder: Path, *, distilled: bool) -> Path:
    text_encoder, tokenizer = qwen3(Qwen3ForCausalLM, 27)  # its layers 9, 18 and 27 are read
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    # Of sines and cosines of the time the slow ones alone: gates without biases would turn from call to call.
    transformer.time_guidance_embed.timestep_embedder.linear_1.weight.data.view(-1, 2, 8)[:, :, :5] = 0
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=distilled,
    ).save_pretrained(folder)
    return folder


def save_z_image(folder: Path, *, shift: float) -> Path:
    """shift: of the schedule, 3 as the turbo model's, or 6."""
    text_encoder, tokenizer = qwen3(Qwen3Model, 2)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=autoencoder(4, 0.1),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=(4, 6, 6),
            axes_lens=(256, 64, 64),
        ),
    ).save_pretrained(folder)
    return folder


def save_all(folder: Path) -> dict[str, Path]:
    """Family name → folder."""
    torch.manual_seed(2)
    return {
        "flux2-klein": save_flux2(folder / "flux2-klein", distilled=True),
        "flux2-klein-base": save_flux2(folder / "flux2-klein-base", distilled=False),
        "z-image": save_z_image(folder / "z-image", shift=6.0),
        "z-image-turbo": save_z_image(folder / "z-image-turbo", shift=3.0),
    }
