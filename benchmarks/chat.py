"""FLUX.2 klein and Z-Image in the sizes that they were published in, as geometries.py has others."""

from __future__ import annotations

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
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .geometries import Geometry, autoencoder, on_cpu
from .joint import WITHOUT_CONVOLUTIONS

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def _qwen3(kind: Any) -> tuple[Any, Qwen2Tokenizer]:
    """Qwen3-4B, without the words that its tokenizer knows."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {word: at for at, word in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=131072, chat_template=TEMPLATE)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return kind(config), tokenizer


def flux2_klein(distilled: bool) -> Flux2KleinPipeline:
    text_encoder, tokenizer = _qwen3(Qwen3ForCausalLM)
    text_encoder.lm_head.weight = text_encoder.model.embed_tokens.weight  # one matrix, also without its numbers
    vae = AutoencoderKLFlux2()
    vae.bn = on_cpu(nn.BatchNorm2d, num_features=128, eps=1e-4, affine=False)
    return Flux2KleinPipeline(
        scheduler=on_cpu(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        is_distilled=distilled,
    )


def z_image(shift: float) -> ZImagePipeline:
    text_encoder, tokenizer = _qwen3(Qwen3Model)
    return ZImagePipeline(
        scheduler=on_cpu(FlowMatchEulerDiscreteScheduler, shift=shift),
        vae=autoencoder(16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, **WITHOUT_CONVOLUTIONS),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(axes_lens=[1536, 512, 512]),
    )


HALF = torch.bfloat16
FLUX2_KLEIN = Geometry("flux2-klein, 4B", "flux2-klein", 1024, 1024, HALF, 1.0, lambda: flux2_klein(distilled=True))
FLUX2_KLEIN_BASE = Geometry(
    "flux2-klein-base, 4B", "flux2-klein-base", 1024, 1024, HALF, 4.0, lambda: flux2_klein(distilled=False)
)
Z_IMAGE = Geometry("z-image", "z-image", 1024, 1024, HALF, 4.0, lambda: z_image(6.0))
Z_IMAGE_TURBO = Geometry("z-image-turbo", "z-image-turbo", 1024, 1024, HALF, 0.0, lambda: z_image(3.0))
CHAT = (FLUX2_KLEIN, FLUX2_KLEIN_BASE, Z_IMAGE, Z_IMAGE_TURBO)
