"""Stable Diffusion 1.5, 2.1, XL and Flux in the sizes that they were published in, with no weights of theirs.

The configurations are those of the published repositories, written down here because nothing is fetched; the simulated
device's tests hold numbers of parameters against the published ones. Weights are put in place by the server's own
loader, so that offloading is what it is there.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from cache import UNetDenoiser
from models.base import ModelSpec
from models.families import FAMILIES
from models.families.flow import FlowFamily
from models.families.sd import StableDiffusionModel
from models.families.sdxl import SDXLModel, SDXLRefinerModel
from models.generation import LoadedModel
from models.libraries import quiet
from models.loading.folder import prepare
from models.loading.quantised import store_fp8
from models.pipeline import PipelineModel
from models.sampling.samplers import DIFFUSION

Fill = Callable[[torch.Size, torch.dtype], Tensor]
"""Makes a weight."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAVED = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}


@dataclass(frozen=True, slots=True)
class Geometry:
    """width, height: pixels of the document's benchmark. build: the pipeline, its networks on the meta device.

    small: what the denoiser's weights are kept in, `fp8` or a type of GGUF; None: in `dtype`.
    """

    name: str
    family: str
    width: int
    height: int
    dtype: torch.dtype
    guidance_scale: float
    build: Callable[[], Any]
    small: str | None = None

    @property
    def is_transformer(self) -> bool:
        return isinstance(FAMILIES[self.family], FlowFamily)

    def load(self, device: str, fill: Fill, memory: int | None = None, **options: Any) -> LoadedModel:
        """memory: bytes that a plan may count on. options: of the ModelSpec."""
        spec = ModelSpec(name=self.name, family=self.family, source=Path("nowhere"), **options)
        with quiet():
            with torch.device("meta"):
                pipeline = self.build()
                if self.small == "fp8":
                    store_fp8(pipeline.transformer, self.dtype)
                elif self.small is not None:
                    _pack(pipeline.transformer, GGMLQuantizationType[self.small], self.dtype)
            for part in pipeline.components.values():
                if isinstance(part, nn.Module):
                    _materialise(part, self.dtype, fill)
            prepare(pipeline, spec)
        model: PipelineModel
        if self.is_transformer:
            model = FAMILIES[self.family].model(spec, pipeline)
        else:
            kinds = {"sdxl": SDXLModel, "sdxl-refiner": SDXLRefinerModel}
            kind = kinds.get(self.family, StableDiffusionModel)
            model = kind(spec, pipeline, UNetDenoiser(pipeline.unet), DIFFUSION)
        model.settle(device, memory)
        if (unet := getattr(pipeline, "unet", None)) is not None and unet.device.type == torch.device(device).type:
            unet.to(memory_format=torch.channels_last)
        return LoadedModel(model)


def random(device: str) -> Fill:
    """Weights on `device` under which activations keep their scale: normal ones by their inputs, biases of one.

    Without biases a block's gates follow the timestep alone, and no first block would be near that of the call before.
    """
    generator = torch.Generator(device).manual_seed(0)

    def fill(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if len(shape) < 2:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(math.prod(shape[1:]) ** -0.5)

    return fill


def _pack(transformer: nn.Module, kind: GGMLQuantizationType, dtype: torch.dtype) -> None:
    """The matrices of its blocks as GGUF files hold them, in diffusers' layers for those. All on the meta device."""
    numbers, size = GGML_QUANT_SIZES[kind]
    packed = {}
    for name, weight in transformer.named_parameters():
        if weight.dim() == 2 and "transformer_blocks." in name:
            blocks = torch.empty(weight.shape[0], weight.shape[1] // numbers * size, dtype=torch.uint8)
            packed[name] = GGUFParameter(blocks, quant_type=kind)
    _replace_with_gguf_linear(transformer, dtype, packed)
    for name, blocks in packed.items():
        transformer.get_submodule(name.removesuffix(".weight"))._parameters["weight"] = blocks


def _materialise(network: nn.Module, dtype: torch.dtype, fill: Fill) -> None:
    """Weights for parameters of the meta device, in `dtype` but for what is small already, and for what the class keeps
    from overflow in float16.
    """
    kept = (getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in network.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in made:  # a matrix that two layers share
                module._parameters[key] = made[parameter]
            elif parameter is not None:
                own = torch.float32 if any(part in f"{name}.{key}".split(".") for part in kept) else dtype
                weight = fill(parameter.shape, parameter.dtype if parameter.element_size() == 1 else own)
                if (kind := getattr(parameter, "quant_type", None)) is not None:
                    module._parameters[key] = GGUFParameter(weight, quant_type=kind)
                else:
                    made[parameter] = module._parameters[key] = nn.Parameter(weight, requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                numbers = torch.arange(buffer.numel(), device="cpu").view(buffer.shape)
                if key.endswith("inv_freq"):  # of a language model's positions
                    module._buffers[key] = 1e4 ** (-numbers / buffer.numel())
                elif key == "position_ids":
                    module._buffers[key] = numbers
                else:
                    raise NotImplementedError(f"{name}.{key}: a buffer whose values the meta device has lost")
    network.eval()


def clip_tokenizer() -> CLIPTokenizer:
    characters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase + ","]
    vocabulary = {word: index for index, word in enumerate(["<|startoftext|>", "<|endoftext|>", *characters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip(cls: Any, width: int, layers: int, heads: int, **changes: Any) -> Any:
    return cls(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            **{"projection_dim": 768, **changes},
        )
    )


def autoencoder(channels: int, width: int = 128, **changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        latent_channels=channels,
        **changes,
    )


def t5(longest: int, width: int = 4096, layers: int = 24) -> tuple[T5EncoderModel, T5Tokenizer]:
    """longest: tokens that the tokenizer fills a text up to."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    text = T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=width,
            d_kv=64,
            d_ff=width * 5 // 2,
            num_layers=layers,
            num_heads=width // 64,
            feed_forward_proj="gated-gelu",
        )
    )
    text.encoder.embed_tokens = text.shared  # one matrix, also where parameters are exchanged for others
    return text, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=longest)


def _stable_diffusion(
    unet: dict[str, Any], text: Any, scheduler: Any, side: int, width: int = 320
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(4, min(width, 128), sample_size=side),
        text_encoder=text,
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=side // 8,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            **unet,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def on_cpu(make: Callable[..., Any], **settings: Any) -> Any:
    with torch.device("cpu"):
        return make(**settings)


def _sd15(width: int = 320, layers: int = 12) -> StableDiffusionPipeline:
    pndm = on_cpu(PNDMScheduler, **SAVED, skip_prk_steps=True)
    unet = {"attention_head_dim": 8, "cross_attention_dim": 768}
    return _stable_diffusion(unet, clip(CLIPTextModel, 768, layers, 12), pndm, 512, width)


def _sd21() -> StableDiffusionPipeline:
    ddim = on_cpu(DDIMScheduler, **SAVED, prediction_type="v_prediction", clip_sample=False)
    unet = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
    return _stable_diffusion(unet, clip(CLIPTextModel, 1024, 23, 16, hidden_act="gelu"), ddim, 768)


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(4, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(CLIPTextModel, 768, 12, 12),
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, 32, 20, hidden_act="gelu", projection_dim=1280),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=on_cpu(EulerDiscreteScheduler, **BETAS, steps_offset=1),
        add_watermarker=False,
    )


def _sdxl_refiner() -> StableDiffusionXLImg2ImgPipeline:
    return StableDiffusionXLImg2ImgPipeline(
        vae=autoencoder(4, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=None,
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, 32, 20, hidden_act="gelu", projection_dim=1280),
        tokenizer=None,
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(384, 768, 1536, 1536),
            layers_per_block=2,
            attention_head_dim=(6, 12, 24, 24),
            use_linear_projection=True,
            transformer_layers_per_block=4,
            cross_attention_dim=1280,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2560,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=on_cpu(EulerDiscreteScheduler, **BETAS, steps_offset=1),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def _flux(distilled: bool, width: int = 4096, layers: int = 24, **transformer: Any) -> FluxPipeline:
    """width, layers: of T5."""
    text, reader = t5(512 if distilled else 256, width, layers)
    flow: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True} if distilled else {"shift": 1.0}
    return FluxPipeline(
        scheduler=on_cpu(FlowMatchEulerDiscreteScheduler, **flow),
        vae=autoencoder(
            16,
            min(width, 128),
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip(CLIPTextModel, 768, layers // 2, 12),
        tokenizer=clip_tokenizer(),
        text_encoder_2=text,
        tokenizer_2=reader,
        transformer=FluxTransformer2DModel(guidance_embeds=distilled, joint_attention_dim=width, **transformer),
    )


_SMALL = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1}
SD15 = Geometry("sd15", "sd15", 768, 512, torch.float16, 7.5, _sd15)
SD21 = Geometry("sd21", "sd21", 768, 768, torch.float16, 7.5, _sd21)
SDXL = Geometry("sdxl", "sdxl", 1024, 1024, torch.float16, 5.0, _sdxl)
FLUX_DEV = Geometry("flux-dev", "flux-dev", 832, 1216, torch.bfloat16, 3.5, lambda: _flux(True))
FLUX_SCHNELL = Geometry("flux-schnell", "flux-schnell", 832, 1216, torch.bfloat16, 0.0, lambda: _flux(False))
SDXL_REFINER = Geometry("sdxl-refiner", "sdxl-refiner", 1024, 1024, torch.float16, 5.0, _sdxl_refiner)
FLUX_SMALL = {kind: replace(FLUX_DEV, name=f"{FLUX_DEV.name}, {kind}", small=kind) for kind in ("fp8", "Q8_0", "Q4_0")}
"""Flux-dev by what its transformer lies in; its T5 in half precision."""
ALL = (SD15, SD21, SDXL, FLUX_DEV, FLUX_SCHNELL)

SMALL_SD = Geometry("small-sd", "sd15", 64, 64, torch.float32, 7.5, lambda: _sd15(32, 2))
SMALL_FLUX = Geometry("small-flux", "flux-schnell", 64, 64, torch.float32, 0.0, lambda: _flux(False, 64, 2, **_SMALL))
SMALL = (SMALL_SD, SMALL_FLUX)
"""The same structures, for a CPU."""
