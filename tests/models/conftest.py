"""Tiny randomly initialised pipelines of the true classes, saved to disk and read back by the families' own loaders."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from models.base import ModelSpec
from models.families.flux import FLUX
from models.families.sd import SD
from models.families.sdxl import SDXL, SDXL_REFINER
from models.generation import LoadedModel

TEXT_LENGTH = 16
TEXT_WIDTH = 16
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def terminal_snr_betas(terminal_snr: float = 1e-4, steps: int = 1000) -> list[float]:
    """Scaled-linear betas, stretched to end at that SNR (Lin et al. 2024, algorithm 1)."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2).cumprod(0).sqrt()
    last = (terminal_snr / (1 + terminal_snr)) ** 0.5
    alphas = last + (alphas - alphas[-1]) * (alphas[0] - last) / (alphas[0] - alphas[-1])
    products = alphas**2
    return (1 - torch.cat([products[:1], products[1:] / products[:-1]])).tolist()


def autoencoder(channels: int, shift: float | None) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        latent_channels=channels,
        layers_per_block=1,
        mid_block_add_attention=False,
        scaling_factor=0.5,
        shift_factor=shift,
    )


def clip_config(**changes: object) -> tuple[CLIPTextConfig, CLIPTokenizer]:
    characters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    vocabulary = {word: index for index, word in enumerate(["<|startoftext|>", "<|endoftext|>", *characters])}
    settings = {
        "vocab_size": len(vocabulary),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)
    return CLIPTextConfig(**settings | changes), tokenizer


def clip(**changes: object) -> tuple[CLIPTextModel, CLIPTokenizer]:
    config, tokenizer = clip_config(**changes)
    return CLIPTextModel(config), tokenizer


def t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config), T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


LEVELS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}


def save_sd(folder: Path, unet: dict[str, Any], text: dict[str, object], scheduler: Any) -> Path:
    """A StableDiffusionPipeline, of four levels of two layers as SD1.5 and SD2.1 unless `unet` says otherwise."""
    text_encoder, tokenizer = clip(**text)
    StableDiffusionPipeline(
        vae=autoencoder(4, None),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**LEVELS | unet, norm_num_groups=4, cross_attention_dim=TEXT_WIDTH),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_flux(folder: Path, guidance: bool, fills: bool = False) -> Path:
    """fills: a FluxFillPipeline, of the published width of its latents."""
    text_encoder, tokenizer = clip()
    t5_encoder, t5_tokenizer = t5(TEXT_WIDTH)
    pipeline, channels = (FluxFillPipeline, 16) if fills else (FluxPipeline, 4)
    pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=autoencoder(channels, 0.1),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder,
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=384 if fills else 4 * channels,
            out_channels=4 * channels,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        ),
    ).save_pretrained(folder)
    return folder


def save_sdxl(folder: Path, in_channels: int = 4) -> Path:
    """Three levels with 1, 2 and 10 transformer layers (none, two, ten where the blocks attend), text_time."""
    text_encoder, tokenizer = clip()
    wide, _ = clip_config(hidden_size=24, hidden_act="gelu", projection_dim=20)
    sizes = 6
    StableDiffusionXLPipeline(
        vae=autoencoder(4, None),
        text_encoder=text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(wide),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            in_channels=in_channels,
            sample_size=8,
            block_out_channels=(8, 16, 32),
            layers_per_block=2,
            norm_num_groups=4,
            attention_head_dim=(2, 4, 8),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=TEXT_WIDTH + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + sizes * 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=EulerDiscreteScheduler(**BETAS),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def save_sdxl_refiner(folder: Path) -> Path:
    """Four levels of two layers, the middle two with four transformer layers; one text encoder, five numbers."""
    _, tokenizer = clip_config()
    wide, _ = clip_config(hidden_size=24, hidden_act="gelu", projection_dim=20)
    StableDiffusionXLImg2ImgPipeline(
        vae=autoencoder(4, None),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(wide),
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 32, 32),
            layers_per_block=2,
            norm_num_groups=4,
            attention_head_dim=(2, 4, 8, 8),
            use_linear_projection=True,
            transformer_layers_per_block=4,
            cross_attention_dim=24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 5 * 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=EulerDiscreteScheduler(**BETAS),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def terminal_snr_scheduler() -> DDIMScheduler:
    """v-prediction on a schedule given by `trained_betas`, trailing timesteps: what tiny-sd is saved with."""
    return DDIMScheduler(
        trained_betas=terminal_snr_betas(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sd"
    return save_sd(folder, {"attention_head_dim": 4}, {}, terminal_snr_scheduler())


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_flux(tmp_path_factory.mktemp("models") / "flux", guidance=False)


@pytest.fixture(scope="session")
def small_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """UNets of two levels of one layer, quick to run and to compile, by what they predict."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(3)
    saved = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **BETAS}
    return {
        prediction: save_sd(folder / prediction, TWO_LEVELS, {}, DDIMScheduler(**saved, prediction_type=prediction))
        for prediction in ("epsilon", "v_prediction")
    }


@pytest.fixture(scope="session")
def family_folders(sd_folder: Path, flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each published family's true topology at small width, saved by diffusers: family name → folder."""
    folder = tmp_path_factory.mktemp("families")
    folders = {"sd": sd_folder, "flux": flux_folder, "flux-schnell": flux_folder}
    torch.manual_seed(1)
    pndm = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    folders["sd15"] = save_sd(folder / "sd15", {"attention_head_dim": 4}, {"hidden_act": "quick_gelu"}, pndm)
    velocity = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    linear = {"attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True}
    folders["sd21"] = save_sd(folder / "sd21", linear, {"hidden_act": "gelu", "projection_dim": 20}, velocity)
    folders["sdxl"] = save_sdxl(folder / "sdxl")
    folders["flux-dev"] = save_flux(folder / "flux-dev", guidance=True)
    folders["sdxl-refiner"] = save_sdxl_refiner(folder / "sdxl-refiner")
    return folders


@pytest.fixture(scope="session")
def sd_spec(sd_folder: Path) -> ModelSpec:
    return ModelSpec(name="random-sd", family="sd", source=sd_folder)


@pytest.fixture(scope="session")
def flux_spec(flux_folder: Path) -> ModelSpec:
    return ModelSpec(name="random-flux", family="flux", source=flux_folder)


@pytest.fixture(scope="session")
def sd(sd_spec: ModelSpec) -> LoadedModel:
    return LoadedModel(SD.load(sd_spec, "cpu"))


@pytest.fixture(scope="session")
def flux(flux_spec: ModelSpec) -> LoadedModel:
    return LoadedModel(FLUX.load(flux_spec, "cpu"))


@pytest.fixture(scope="session")
def sdxl(family_folders: dict[str, Path]) -> LoadedModel:
    return LoadedModel(SDXL.load(ModelSpec(name="random-sdxl", family="sdxl", source=family_folders["sdxl"]), "cpu"))


@pytest.fixture(scope="session")
def refiner(family_folders: dict[str, Path]) -> LoadedModel:
    spec = ModelSpec(name="random-refiner", family="sdxl-refiner", source=family_folders["sdxl-refiner"])
    return LoadedModel(SDXL_REFINER.load(spec, "cpu"))
