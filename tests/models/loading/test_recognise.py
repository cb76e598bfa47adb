"""Each kind of file is told by its tensors, in the published sizes; what is ours of the families is as published."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from models.loading.recognise import Role, recognise
from models.loading.shapes import configurations, unusual
from tests.models import original
from tests.models.original import Tensors, header_of

FAMILIES = ("sd15", "sd21", "sdxl", "flux-schnell", "flux-dev")
PUBLISHED = {  # parameters, as the publications, their model cards or whoever counted them say
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "flux-schnell": {"transformer": 11_891_178_560, "vae": 83_819_683, "text_encoder_2": 4_762_310_656},
    "flux-dev": {"transformer": 11_901_408_320, "vae": 83_819_683, "text_encoder_2": 4_762_310_656},
}


@cache
def networks(family: str) -> SimpleNamespace:
    return original.networks(configurations(family, {}))


@cache
def published(family: str) -> Tensors:
    """The file, without data."""
    made = networks(family)
    return original.flux(made.transformer) if family.startswith("flux") else original.stable_diffusion(made)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without(beginning: str, tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(beginning)}


def tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def widened(family: str, channels: int) -> Tensors:
    return published(family) | {"model.diffusion_model.input_blocks.0.0.weight": tensor(320, channels, 3, 3)}


def refiner() -> Tensors:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(384, 768, 1536, 1536),
            attention_head_dim=(6, 12, 24, 24),
            use_linear_projection=True,
            transformer_layers_per_block=4,
            cross_attention_dim=1280,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2560,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )
    attends = [False, True, True, False]
    tensors = {original.unet_name(key, 2, attends): value for key, value in unet.state_dict().items()}
    second = original.open_clip(networks("sdxl").text_encoder_2)
    vae = original.autoencoder(networks("sdxl").vae)
    return (
        under("model.diffusion_model.", tensors)
        | under("conditioner.embedders.0.model.", second)
        | under("first_stage_model.", vae)
    )


def flux_of_comfyui() -> Tensors:
    """flux1-dev-fp8.safetensors: everything in one file."""
    made = networks("flux-dev")
    return (
        under("model.diffusion_model.", published("flux-dev"))
        | under("vae.", original.autoencoder(made.vae))
        | under("text_encoders.clip_l.transformer.", original.clip(made.text_encoder))
        | under("text_encoders.t5xxl.transformer.", made.text_encoder_2.state_dict())
        | {"text_encoders.clip_l.logit_scale": tensor()}
    )


MODELS: dict[str, tuple[Callable[[], Tensors], str, set[Role]]] = {
    "SD1.5": (lambda: published("sd15"), "sd15", {"unet", "vae4", "clip_l"}),
    "SD2.1": (lambda: published("sd21"), "sd21", {"unet", "vae4", "clip_h"}),
    "SDXL": (lambda: published("sdxl"), "sdxl", {"unet", "vae4", "clip_l", "clip_g"}),
    "Flux schnell, the transformer": (lambda: published("flux-schnell"), "flux-schnell", {"flux"}),
    "Flux dev, the transformer": (lambda: published("flux-dev"), "flux-dev", {"flux"}),
    "Flux dev, of ComfyUI": (flux_of_comfyui, "flux-dev", {"flux", "vae16", "clip_l", "t5"}),
    "Flux dev, of diffusers": (lambda: networks("flux-dev").transformer.state_dict(), "flux-dev", {"flux"}),
    "SD1.5 with what training left": (
        lambda: (
            published("sd15")
            | {"model_ema.diffusion_modelinput_blocks00weight": tensor(320, 4, 3, 3), "model_ema.decay": tensor()}
            | {"betas": tensor(1000), "sqrt_alphas_cumprod": tensor(1000), "global_step": tensor()}
            | {"cond_stage_model.transformer.text_model.embeddings.position_ids": tensor(1, 77)}
        ),
        "sd15",
        {"unet", "vae4", "clip_l"},
    ),
    "SD1.5 pruned of its autoencoder": (
        lambda: without("first_stage_model.", published("sd15")),
        "sd15",
        {"unet", "clip_l"},
    ),
    "SD1.5, the UNet alone": (
        lambda: {
            name.removeprefix("model.diffusion_model."): value
            for name, value in published("sd15").items()
            if name.startswith("model.")
        },
        "sd15",
        {"unet"},
    ),
    "SD1.5 of an old transformers": (
        lambda: {name.replace(".text_model.", "."): value for name, value in published("sd15").items()},
        "sd15",
        {"unet", "vae4", "clip_l"},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_told_by_its_tensors(kind: str) -> None:
    made, family, roles = MODELS[kind]
    found = recognise(header_of(made()))
    assert (found.family, found.reason, set(found.networks)) == (family, "", roles)
    assert unusual(family, found.networks) is None


OTHERS: dict[str, tuple[Callable[[], Tensors], str]] = {
    "SD1.5 for inpainting": (lambda: widened("sd15", 9), "is an inpainting model"),
    "SDXL for inpainting": (lambda: widened("sdxl", 9), "is an inpainting model"),
    "InstructPix2Pix": (lambda: widened("sd15", 8), "is an InstructPix2Pix model"),
    "SDXL's refiner": (refiner, "is SDXL's refiner"),
    "Flux for filling": (lambda: published("flux-dev") | {"img_in.weight": tensor(3072, 384)}, "is a Flux for filling"),
    "an autoencoder": (
        lambda: original.autoencoder(networks("sd15").vae),
        "is an autoencoder of Stable Diffusion: a part",
    ),
    "Flux's autoencoder": (lambda: original.autoencoder(networks("flux-dev").vae), "is an autoencoder of 16 channels"),
    "CLIP-L": (lambda: original.clip(networks("sd15").text_encoder), "is a text encoder CLIP-L"),
    "CLIP-G": (lambda: original.clip(networks("sdxl").text_encoder_2), "is a text encoder OpenCLIP-G"),
    "T5": (lambda: networks("flux-dev").text_encoder_2.state_dict(), "is a text encoder T5-XXL"),
    "a T5 in pieces, the first": (
        lambda: without("encoder.final_layer_norm", networks("flux-dev").text_encoder_2.state_dict()),
        "is none of the kinds of files that are known here",
    ),
    "kohya's LoRA": (
        lambda: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": tensor(4, 320)},
        "is a LoRA: put it into the folder of LoRAs",
    ),
    "PEFT's LoRA": (lambda: {"transformer.x_embedder.lora_A.weight": tensor(4, 64)}, "is a LoRA"),
    "a LoHa": (lambda: {"lora_unet_conv_in.hada_w1_a": tensor(4, 320)}, "is a LoRA"),
    "an embedding": (lambda: {"emb_params": tensor(4, 768)}, "is an embedding: put it into"),
    "an SDXL embedding": (lambda: {"clip_l": tensor(2, 768), "clip_g": tensor(2, 1280)}, "is an embedding"),
    "a ControlNet": (lambda: {"control_model.time_embed.0.weight": tensor(1280, 320)}, "is a ControlNet"),
    "an upscaler": (lambda: {"conv_first.weight": tensor(64, 3, 3, 3)}, "is an upscaler"),
    "Chroma": (
        lambda: {"distilled_guidance_layer.in_proj.weight": tensor(5120, 64), **published("flux-schnell")},
        "is a Chroma",
    ),
    "SD3": (lambda: {"joint_blocks.0.x_block.attn.qkv.weight": tensor(4608, 1536)}, "is a Stable Diffusion 3"),
    "a UNet of diffusers": (lambda: networks("sd15").unet.state_dict(), "is a UNet in diffusers' names"),
    "something else": (lambda: {"layer.weight": tensor(2, 2)}, "is none of the kinds of files that are known here"),
    "nothing": (dict, "holds no tensors"),
    "Playground 2.5": (lambda: published("sdxl") | {"edm_mean": tensor(4)}, "was trained in EDM's parametrisation"),
    "what another quantiser left": (
        lambda: published("sd15") | {"model.diffusion_model.out.2.weight.absmax": tensor()},
        r"holds model.diffusion_model.out.2.weight.absmax, a part of a quantisation that is not supported",
    ),
    "a second denoiser": (
        lambda: published("sd15") | under("another_model.", {"weight": tensor(2, 2)}),
        r"holds 1 tensors that belong to no network known here, 'another_model.weight' first",
    ),
    "a UNet without its input": (
        lambda: {"model.diffusion_model.input_blocks.0.0.weight": tensor(320, 4, 3, 3)},
        "lacks a tensor that every model of its kind has: 'proj_in.weight'",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_model_here_is_told_why(kind: str) -> None:
    made, reason = OTHERS[kind]
    found = recognise(header_of(made()))
    assert (found.family, found.reason[: len(reason)]) == (None, reason)


def test_a_pruned_structure_is_told() -> None:
    fewer = {name: value for name, value in published("sdxl").items() if ".transformer_blocks.9." not in name}
    found = recognise(header_of(fewer))
    assert "has a UNet of 1560 tensors, and the published one of sdxl has 1680" in str(unusual("sdxl", found.networks))


@pytest.mark.parametrize("family", FAMILIES)
def test_our_shapes_are_the_published_ones(family: str) -> None:
    made = vars(networks(family))
    counted = {name: sum(parameter.numel() for parameter in made[name].parameters()) for name in PUBLISHED[family]}
    assert counted == PUBLISHED[family]


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "flux-dev"])
def test_widths_read_off_the_published_tensors_are_the_published_ones(family: str) -> None:
    tensors = flux_of_comfyui() if family == "flux-dev" else published(family)
    found = recognise(header_of(tensors)).networks
    roles = {"unet": "unet", "transformer": "flux", "text_encoder": "clip_h" if family == "sd21" else "clip_l"}
    roles |= {"text_encoder_2": "t5" if family == "flux-dev" else "clip_g"}
    roles |= {"vae": "vae16" if family == "flux-dev" else "vae4"}
    read = {component: found[role] for component, role in roles.items() if role in found}  # type: ignore[index]
    expected = configurations(family, {})
    if family == "sd21":
        expected["text_encoder/config.json"]["projection_dim"] = 1024  # its last layer and projection are not run
    assert configurations(family, read) == expected


@pytest.mark.parametrize(
    ("keys", "said", "expected"),
    [
        ([], {}, (None, None)),
        (["v_pred"], {}, ("v_prediction", False)),
        (["v_pred", "ztsnr"], {}, ("v_prediction", True)),
        ([], {"modelspec.prediction_type": "v"}, ("v_prediction", None)),
        ([], {"modelspec.prediction_type": "epsilon"}, ("epsilon", None)),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False)),
    ],
)
def test_what_the_file_says_of_its_prediction(
    keys: list[str], said: dict[str, str], expected: tuple[str | None, bool | None]
) -> None:
    found = recognise(header_of(published("sdxl") | {key: tensor(0) for key in keys}, said))
    assert (found.family, found.prediction, found.terminal_snr) == ("sdxl", *expected)
