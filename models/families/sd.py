"""Stable Diffusion 1 and 2: CLIP text, a UNet on latents, an autoencoder. A variant is one entry of data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from models.base import CacheName, DtypeName, FreeU, GenerationParams, ModelSpec
from models.libraries import first_line, quiet
from models.loading.folder import damaged, read_json
from models.pipeline import PipelineModel
from models.run import Kind
from models.sampling.samplers import DIFFUSION, Sampler
from models.text.clip import MOST_WINDOWS, encoders, left_out, plain_enough, states
from models.text.prompt import parse, plain, remarks
from models.tuning.placements import Calibrated, place
from models.tuning.profile import read

from .family import ModelFamily

if TYPE_CHECKING:
    import torch

    from cache import UNetDenoiser
    from cache.deepcache.schedule import Placement
    from models.guidance import Guidance
    from models.layout import Layout

_KEPT_MAPS = 4  # of the first level's channels: two states of DeepCache, and what is made of them
_NO_CHECKER: Mapping[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
}

_FREEU = FreeU(b1=1.5, b2=1.6, s1=0.9, s2=0.2)  # for SD1.5


class StableDiffusionModel(PipelineModel):
    """Guidance above 1 runs the unconditional half in the same batch (Ho and Salimans 2022)."""

    denoiser: UNetDenoiser

    def __init__(
        self,
        spec: ModelSpec,
        pipeline: Any,
        denoiser: UNetDenoiser,
        choices: Mapping[str, Sampler],
        placements: tuple[Calibrated, ...] = (),
    ) -> None:
        super().__init__(spec, pipeline, denoiser, choices)
        self.placements = placements

    def view(self, scheduler: Any, sampling: tuple[str, str], guidance: Guidance) -> UNetDenoiser:
        from cache.solver import timesteps_of

        def rule(timestep: float, interval: int, branch: int | None) -> Placement | None:
            timesteps = timesteps_of(scheduler, timestep)
            return None if timesteps is None else place(self.placements, *sampling, timesteps, interval, branch)

        return self.denoiser.ruled(rule, guided=guidance.acts)

    def sibling(self, kind: Kind) -> Any:
        """With a UNet that diffusers' pipelines for inpainting take for one of four channels, whatever its latents."""
        pipeline = super().sibling(kind)
        if kind == "Inpaint" and not self.inpaints:
            pipeline.__dict__["unet"] = _OfFour(pipeline.unet)
        return pipeline

    def _encode(self, params: GenerationParams) -> dict[str, torch.Tensor | None]:
        prompt, negative_prompt = parse(params.prompt), parse(params.negative_prompt)
        guided = self.runs_twice(params)
        clips = encoders(self.pipeline, self.device, params.clip_skip)
        if plain_enough(clips, [prompt, negative_prompt], params.clip_skip):
            positive, negative = self.pipeline.encode_prompt(
                plain(prompt), self.device, 1, guided, plain(negative_prompt)
            )  # (1, tokens, D) each; None for the negative one without guidance
        else:
            positive, negative = states(clips, [prompt, negative_prompt])
            negative = negative if guided else None
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    @property
    def layout(self) -> Layout:
        from models.layout import Spatial

        return Spatial()

    def inputs(self, height: int, width: int) -> Mapping[str, Any]:
        from cache.views.unet import inputs_of

        return inputs_of(self.pipeline.unet.config, (height, width), self.pipeline.vae.dtype)

    def rows(self, *, guided: bool) -> int:
        return 2 if guided else 1

    @property
    def kept_cells(self) -> int:
        return _KEPT_MAPS * int(self.pipeline.unet.config.block_out_channels[0])

    def runs_twice(self, params: GenerationParams) -> bool:
        return params.guidance_scale > 1 and self.pipeline.unet.config.time_cond_proj_dim is None  # as the pipelines

    def guidance(self, params: GenerationParams) -> dict[str, float]:
        rescale = {"guidance_rescale": params.guidance_rescale} if params.guidance_rescale else {}
        return {"guidance_scale": params.guidance_scale, **rescale}

    def warnings(self, params: GenerationParams) -> list[str]:
        sentences = remarks(f"{params.prompt}\n{params.negative_prompt}", weights=True)
        clips = encoders(self.pipeline, self.device, params.clip_skip)
        for name, prompt in (("prompt", params.prompt), ("negative prompt", params.negative_prompt)):
            if len(prompt.encode()) > 8 * MOST_WINDOWS and (characters := left_out(clips, parse(prompt))):
                sentences.append(
                    f"The {name} is longer than {MOST_WINDOWS} windows of the text encoder: its last {characters} "
                    "characters were not read."
                )
        if params.negative_prompt and params.guidance_scale <= 1:
            sentences.append("The negative prompt has no effect at a guidance scale of 1 or less.")
        if params.guidance_rescale and params.guidance_scale <= 1:
            sentences.append("guidance_rescale has no effect at a guidance scale of 1 or less.")
        return sentences


class _OfFour:
    """A UNet to pipelines that refuse to blend latents of any other number of channels, and do nothing else with it."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self.config = type(unet.config)({**unet.config, "in_channels": 4})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self._unet(*args, **inputs)


@lru_cache(maxsize=32)
def _branch_costs(config: str) -> tuple[float, ...]:
    """Of a UNet of this shape, in JSON: a folder of checkpoints holds many of one."""
    import torch

    from cache import UNetDenoiser

    with quiet(), torch.device("meta"):
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_config(json.loads(config))
    return UNetDenoiser(unet).branch_costs


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetFamily(ModelFamily):
    """A family of diffusers pipelines around a UNet2DConditionModel."""

    pipeline: str = "StableDiffusionPipeline"
    network: str = "unet"
    text_encoders: Mapping[str, str] = field(default_factory=lambda: {"text_encoder": "CLIPTextModel"})
    extras: Mapping[str, Any] = field(default_factory=lambda: _NO_CHECKER)
    half: DtypeName = "float16"
    cache: CacheName = "deepcache"
    table: Mapping[str, Sampler] = field(default_factory=lambda: DIFFUSION)
    size_multiple: int = 8
    steps: int = 20
    guidance_scale: float = 7.5
    freeu: FreeU | None = _FREEU
    controlnets: bool = True
    model_class: type[StableDiffusionModel] = StableDiffusionModel

    def reuse_costs(self, spec: ModelSpec) -> tuple[float, ...]:
        """Counted on the UNet's shape alone, at the latent size that its configuration names."""
        self.check(spec)
        config = json.dumps(read_json(spec, "unet/config.json"))
        try:
            return _branch_costs(config)
        except Exception as error:  # whatever torch and diffusers make of a nonsensical shape
            raise damaged(spec, f"unet/config.json: {first_line(error)}") from error

    def model(self, spec: ModelSpec, pipeline: Any) -> StableDiffusionModel:
        import torch

        from cache import UNetDenoiser

        pipeline.unet.to(memory_format=torch.channels_last)
        denoiser = UNetDenoiser(pipeline.unet, num_train_timesteps=int(pipeline.scheduler.config.num_train_timesteps))
        return self.model_class(spec, pipeline, denoiser, self.table, read(spec).placements)


SD = UNetFamily(name="sd", native_size=512)
SD15 = UNetFamily(name="sd15", native_size=512, traits={"use_linear_projection": False})
SD21 = UNetFamily(
    name="sd21",
    native_size=768,
    traits={"use_linear_projection": True},
    freeu=FreeU(b1=1.4, b2=1.6, s1=0.9, s2=0.2),
)
