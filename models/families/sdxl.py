"""Stable Diffusion XL: two text encoders, a pooled text and sizes beside the timestep (Podell et al. 2023).

Its refiner, for the last steps (section 2.5), has a wider UNet of four levels and the second of the text encoders
alone, and is told how pleasing the picture is to be in place of its target size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.base import FreeU, GenerationParams
from models.run import Kind
from models.sampling.samplers import AYS_TIMESTEPS_XL
from models.text.clip import encoders, plain_enough, states
from models.text.prompt import parse, plain, windows

from .sd import StableDiffusionModel, UNetFamily

if TYPE_CHECKING:
    import torch


class SDXLModel(StableDiffusionModel):
    """The pipeline itself makes the sizes that the UNet is told: as drawn, nothing cropped."""

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        import torch

        prompt, negative_prompt = parse(params.prompt), parse(params.negative_prompt)
        guided = self.runs_twice(params)
        # Without a negative prompt the model was trained, and diffusers draws, with zeros in its place.
        zeros = not params.negative_prompt.strip() and self.pipeline.config.force_zeros_for_empty_prompt
        positive, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=plain(windows(prompt)[0]),  # of which the pooled text is made, as the web UI does it
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=None if zeros else plain(windows(negative_prompt)[0]),
        )  # (1, tokens, D), pooled (1, D'); None for the negative ones without guidance
        clips = encoders(self.pipeline, self.device, params.clip_skip, trained=1, normed=False)
        if not plain_enough(clips, [prompt, negative_prompt], params.clip_skip):
            positive, negative = states(clips, [prompt, negative_prompt])
            negative = None if not guided else torch.zeros_like(positive) if zeros else negative
        return {
            "prompt_embeds": positive,
            "negative_prompt_embeds": negative,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    @property
    def published_timesteps(self) -> Sequence[int]:
        return AYS_TIMESTEPS_XL

    @property
    def upcasts(self) -> bool:
        return bool(self.pipeline.vae.config.force_upcast)


class SDXLRefinerModel(SDXLModel):
    """The pipeline itself adds the scores that it was published with: 6, and 2.5 without text."""

    def sibling(self, kind: Kind) -> Any:
        return self.pipeline if kind == "Img2Img" else super().sibling(kind)


SDXL = UNetFamily(
    name="sdxl",
    native_size=1024,
    model_class=SDXLModel,
    pipeline="StableDiffusionXLPipeline",
    text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
    extras={"feature_extractor": None, "image_encoder": None, "add_watermarker": False},
    traits={"addition_embed_type": "text_time"},
    guidance_scale=5.0,
    freeu=FreeU(b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    refiners=frozenset({"sdxl", "sdxl-refiner"}),
)
SDXL_REFINER = replace(
    SDXL,
    name="sdxl-refiner",
    model_class=SDXLRefinerModel,
    pipeline="StableDiffusionXLImg2ImgPipeline",
    text_encoders={"text_encoder_2": "CLIPTextModelWithProjection"},
    controlnets=False,
    refiners=frozenset(),
    needs_picture=True,
)
