"""The body of POST /api/generate: every field of it, its bounds, its words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from app.errors import TOGETHER, Invalid, invalid, shown
from app.http.foreign import LIGHTDIFFUSION, CfgFree, ControlNet, translated
from app.images import OutputFormat

EXAMPLE: dict[str, JsonValue] = {
    "prompt": "a misty forest at twilight",
    "width": 768,
    "height": 512,
    "deepcache_enabled": True,
    "deepcache_interval": 3,
    "deepcache_depth": 2,
}
PRESETS: dict[str, dict[str, int]] = {
    "balanced": {"deepcache_interval": 3, "deepcache_depth": 2, "deepcache_start_step": 0, "deepcache_end_step": 1000},
    "max_speed": {"deepcache_interval": 5, "deepcache_depth": 3, "deepcache_start_step": 0, "deepcache_end_step": 1000},
    "max_quality": {
        "deepcache_interval": 2,
        "deepcache_depth": 1,
        "deepcache_start_step": 0,
        "deepcache_end_step": 1000,
    },
    "partial": {"deepcache_interval": 3, "deepcache_depth": 2, "deepcache_start_step": 200, "deepcache_end_step": 800},
}
LONGEST_PROMPT = 10_000
LONGEST_NAME = 200
MOST_CONTROLS = 4
Model = TypeVar("Model", bound=BaseModel)

Prompt = Annotated[str, Field(max_length=LONGEST_PROMPT)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]


class Lora(BaseModel):
    """An adapter under the configured folder."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    name: Name = Field(description="Its name under the configured folder; folder/name for one in a subfolder.")
    weight: float = Field(1.0, ge=-4, le=4, description="Its strength; 1 as trained, 0 off.")
    text_weight: float | None = Field(
        None, ge=-4, le=4, description="Its strength in the text encoders, where that is another."
    )


class Control(BaseModel):
    """A ControlNet of the configured folder, and the picture that it reads."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: Name = Field(description="Its name, see GET /api/controlnets.")
    image: str = Field(description="Its map, or with edges any picture: base64 or a data URL. Never a path or a URL.")
    weight: float = Field(1.0, ge=0, le=2, description="The strength of what it adds; 0 adds nothing.")
    start: float = Field(0.0, ge=0, lt=1, description="The share of the run's steps before it acts.")
    end: float = Field(1.0, gt=0, le=1, description="The share of the run's steps after which it acts no more.")
    edges: bool = Field(False, description="Show it the picture's edges (Canny 1986) in place of the picture.")

    @model_validator(mode="after")
    def _in_order(self) -> Control:
        if self.start >= self.end:
            raise _located("start", "must be less than end; swap them")
        return self


class GenerateRequest(BaseModel):
    """What to draw and how. Unknown fields are refused."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        json_schema_extra={"examples": [EXAMPLE]},
    )
    _preset_fields: ClassVar[tuple[str, ...]] = tuple(PRESETS["balanced"])
    _left_out: tuple[str, ...] = PrivateAttr(())
    _chosen_by_speedup: ClassVar[re.Pattern[str]] = re.compile("(deepcache|fbcache)_|cache_forecast")

    prompt: Prompt = Field(
        description="What the picture shows. UNet models read it whole, however long, and take weights: (word:1.3), "
        "(word) for 1.1, [word] for 1/1.1. The file name of an embedding stands for it."
    )
    negative_prompt: Prompt = Field("", description="What it must not show; read by UNet models.")
    model: Name | None = Field(
        None, description="A name from GET /api/models; null takes the server's default. Never a path or a hub id."
    )
    flux_enabled: bool = Field(False, description="Shorthand for the configured Flux model.")
    width: int = Field(512, ge=64, le=2048, description="Pixels, a multiple of 8 (16 for Flux).")
    height: int = Field(512, ge=64, le=2048, description="Pixels, a multiple of 8 (16 for Flux).")
    num_images: int = Field(1, ge=1, le=10, description="How many pictures; number i is drawn from seed + i.")
    batch_size: int = Field(1, ge=1, le=16, description="How many of them are denoised together.")
    steps: int | None = Field(None, ge=1, le=150, description="Denoising steps; null takes the model's default.")
    guidance_scale: float | None = Field(
        None, ge=0, le=30, description="Weight of the prompt; null takes the model's default. Also called cfg_scale."
    )
    guidance_rescale: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Pulls the contrast that guidance adds back by this share, against overexposure. UNet models only.",
    )
    guidance_start: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The share of the run's steps before guidance begins; without it a step costs half.",
    )
    guidance_end: float = Field(
        1.0,
        ge=0,
        le=1,
        description="The share of the run's steps after which guidance ends; 0 to 1 guides all of it. Also called "
        "cfg_free_start_percent, in percent, beside cfg_free_enabled.",
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        le=12,
        description="Which layer of the text encoder is read, as AUTOMATIC1111 counts: 1 the one that the model was "
        "trained on, 2 the one before it. UNet models only.",
    )
    freeu: bool = Field(
        False,
        description="Weigh the UNet's skips and the states that they meet anew (Si et al. 2023), for more detail at no "
        "cost. UNet models only.",
    )
    freeu_b1: float | None = Field(
        None, ge=0, le=3, description="FreeU: the first level's state; null takes what is published for the family."
    )
    freeu_b2: float | None = Field(None, ge=0, le=3, description="FreeU: the second level's state.")
    freeu_s1: float | None = Field(None, ge=0, le=3, description="FreeU: the first level's skips, low frequencies.")
    freeu_s2: float | None = Field(None, ge=0, le=3, description="FreeU: the second level's skips, low frequencies.")
    seed: int | None = Field(
        None, ge=-1, le=2**32 - 1, description="Where the noise comes from; null or -1 draws one. Always returned."
    )
    sampler: Name | None = Field(None, description="A sampler of the model, see GET /api/models; null: its own.")
    scheduler: Name | None = Field(
        None, description="How the sampler's steps are spaced; null: as the model was saved."
    )

    deepcache_enabled: bool = Field(False, description="Reuse deep UNet features between steps. UNet models only.")
    deepcache_preset: Literal["balanced", "max_speed", "max_quality", "partial"] | None = Field(
        None,
        description="Sets interval, depth, start_step and end_step: balanced 3, 2, 0, 1000; max_speed 5, 3, 0, 1000; "
        "max_quality 2, 1, 0, 1000; partial 3, 2, 200, 800. None of the four may be given beside it.",
    )
    deepcache_interval: int = Field(
        3, ge=1, le=10, description="One denoiser call in so many is computed in full; 1 caches nothing."
    )
    deepcache_depth: int = Field(
        2, ge=0, le=12, description="At depth d a reuse step costs at most 1/(d + 2) of a full one; higher is faster."
    )
    deepcache_schedule: Literal["auto", "uniform"] | None = Field(
        None,
        description="Where the computed calls lie: uniform every interval-th, auto as many where they were found to "
        "help most (uniform if a window is set); null is auto.",
    )
    deepcache_guidance: Literal["full", "reuse"] | None = Field(
        None,
        description="What a reused step runs of a guided batch: full both halves; reuse the half with the prompt, at "
        "half the cost, the guidance difference being forecast; null is full.",
    )
    deepcache_start_step: int = Field(
        0, ge=0, le=1000, description="Reuse from this progress on; 0 is pure noise, 1000 is finished."
    )
    deepcache_end_step: int = Field(1000, ge=0, le=1000, description="Reuse up to this progress.")
    fbcache_enabled: bool | None = Field(
        None, description="First-block cache. null: on for Flux. Transformer models only."
    )
    fbcache_threshold: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Reuse while the first block's residual lies less beside its line, or with cache_forecast false "
        "differs by less; 0 never reuses. Also called residual_diff_threshold.",
    )
    fbcache_max_consecutive: int | None = Field(
        None, ge=1, le=50, description="Most reuse steps in a row; null sets no cap."
    )
    cache_forecast: bool = Field(
        True,
        description="Whether a reuse step predicts what it skips, and a computed one repays what the reused ones "
        "before it got wrong, for samplers that draw no noise and call the denoiser once a step; false is the "
        "published cache, which repeats the last value.",
    )
    cache_speedup: float | None = Field(
        None,
        ge=1,
        le=6,
        description="Draw what `steps` uncached steps would, so many times faster, as near to it as the model's "
        "profile allows; the report's `chosen` says how. Of the other cache fields only cache_floor goes with it.",
    )
    cache_floor: float | None = Field(
        None, gt=0, le=100, description="PSNR to the uncached picture, dB, that cache_speedup is not to fall below."
    )

    attention: Literal["auto", "sdpa", "sage", "sparge"] = Field(
        "auto", description="Attention kernel; auto takes the best that the model and device can run."
    )
    compile: bool = Field(
        False,
        description="Run the denoiser's layers compiled; the first picture of a size waits for it. Also called "
        "torch_compile.",
    )
    stable_fast: bool = Field(False, description="The same, for UNet models alone.")
    img2img_enabled: bool = Field(False, description="Start from a picture instead of noise: img2img_image.")
    img2img_image: str | None = Field(None, description="That picture: base64 or a data URL. Never a path or a URL.")
    img2img_denoise: float = Field(0.75, ge=0, le=1, description="How much of it is drawn anew; 1 is all.")
    refiner_model: Name | None = Field(
        None, description="A second model that finishes what an SDXL began: SDXL's refiner, or another SDXL."
    )
    refiner_switch: float = Field(
        0.8, gt=0, lt=1, description="The share of the noise schedule after which refiner_model goes on."
    )
    mask: str | None = Field(
        None, description="Draw a part of img2img_image alone: a picture of its aspect, white there, as it is sent."
    )
    mask_blur: int = Field(4, ge=0, le=64, description="Softens the mask's edge: pixels of a Gaussian's sigma.")
    mask_fill: Literal["original", "noise"] = Field("original", description="What the masked part begins from.")
    inpaint_area: Literal["whole", "masked"] = Field(
        "whole",
        description="What is drawn at width × height: the picture, or a close-up of the mask, which is put back.",
    )
    inpaint_padding: int = Field(32, ge=0, le=1024, description="Pixels around the mask that the close-up shows too.")
    outpaint_left: int = Field(0, ge=0, le=2048, description="Draw so many pixels of the width beside img2img_image.")
    outpaint_top: int = Field(0, ge=0, le=2048, description="The same above it.")
    outpaint_right: int = Field(0, ge=0, le=2048, description="The same on its other side.")
    outpaint_bottom: int = Field(0, ge=0, le=2048, description="The same below it.")
    hires_fix: bool = Field(False, description="Draw at half the size first, then enlarge and refine.")
    hires_upscaler: Name | None = Field(
        None, description="What enlarges in between: an upscaler of GET /api/adapters; null is Lanczos."
    )
    adetailer: bool = Field(False, description="Find faces and draw them anew in detail.")
    upscale: Name | None = Field(
        None, description="Enlarge the finished picture by this upscaler, as many times as it was made for."
    )
    multiscale_enabled: bool = Field(False, description="Run some steps at lower resolution.")
    multiscale_factor: float = Field(0.5, gt=0, le=1, description="That resolution's share of the full one.")
    multiscale_fullres_start: int = Field(3, ge=0, le=150, description="First steps at full resolution.")
    multiscale_fullres_end: int = Field(8, ge=0, le=150, description="Last steps at full resolution.")
    multiscale_intermittent: bool = Field(True, description="Every fourth step in between at full resolution.")
    loras: list[Lora] = Field(default=[], max_length=16, description="Adapters to apply, safetensors only.")
    control: list[Control] = Field(
        default=[],
        max_length=MOST_CONTROLS,
        description="ControlNets, each shown a picture (image), cut to width × height, by which it steers where things "
        "stand; of model and image each has one, weight is 0 to 2, start and end are shares of the steps.",
    )
    enable_preview: bool = Field(False, description="Send intermediate pictures on the job's event stream.")
    deadline_seconds: float | None = Field(
        None, gt=0, description="Give up and answer 504 after so many seconds; null takes the server's limit."
    )
    output_format: OutputFormat = Field(
        "png", description="png carries the settings as text: AUTOMATIC1111's `parameters` and one JSON chunk."
    )
    rerender: Name | None = Field(
        None,
        description="In prompt's place the id of a job of POST /api/jobs: its request once more, with the seed that it "
        "got and no cache. Passes, output_format, enable_preview and deadline_seconds may stand beside it, and one of "
        "its seeds for that picture alone.",
    )

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _no_nul(cls, value: str) -> str:
        if "\0" in value:
            raise PydanticCustomError("nul", "must not contain the NUL character; remove it")
        return value

    @field_validator(
        "fbcache_threshold",
        *("guidance_scale", "guidance_rescale", "guidance_start", "guidance_end", "img2img_denoise"),
        *("freeu_b1", "freeu_b2", "freeu_s1", "freeu_s2"),
    )
    @classmethod
    def _no_negative_zero(cls, value: float | None) -> float | None:
        return value + 0.0 if value is not None else None  # -0.0 + 0.0 is 0.0; the answer and PNG print it

    @field_validator("cache_forecast", mode="before")
    @classmethod
    def _no_kind(cls, value: object) -> object:
        if isinstance(value, str):
            raise PydanticCustomError(
                "kinds", "has no kinds any more; give true, the default, or false, which is the published cache"
            )
        return value

    @field_validator("loras")
    @classmethod
    def _once(cls, value: list[Lora]) -> list[Lora]:
        if len({lora.name for lora in value}) < len(value):
            raise PydanticCustomError("twice", "name each adapter once; add their weights up")
        return value

    @model_validator(mode="after")
    def _together(self) -> GenerateRequest:
        if self.deepcache_preset is not None:
            for field in self._preset_fields:
                if field in self.model_fields_set:
                    raise _located(field, f"is set by deepcache_preset {self.deepcache_preset!r} already; give one")
        if self.cache_speedup is not None:
            for field in self.model_fields_set:
                if self._chosen_by_speedup.match(field) and getattr(self, field) is not None:
                    raise _located(field, "is chosen by cache_speedup; leave one of the two out")
        if self.deepcache_start_step > self.deepcache_end_step:
            raise _located("deepcache_start_step", "must not be greater than deepcache_end_step; swap them")
        if self.guidance_start > self.guidance_end:
            raise _located("guidance_start", "must not be greater than guidance_end; swap them")
        if self.refiner_model is None and "refiner_switch" in self.model_fields_set:
            raise _located("refiner_switch", "is read with refiner_model alone; name one, or leave it out")
        return self

    @property
    def left_out(self) -> tuple[str, ...]:
        """A sentence on each field of another API that was taken and has no effect."""
        return self._left_out

    @property
    def deepcache(self) -> dict[str, Any]:
        """DeepCache's four numbers, the preset filled in, by the names of its constructor."""
        if self.deepcache_preset is not None:
            values = PRESETS[self.deepcache_preset]
        else:
            values = {field: getattr(self, field) for field in self._preset_fields}
        return {field.removeprefix("deepcache_").removesuffix("_step"): value for field, value in values.items()}

    @property
    def freeu_factors(self) -> dict[str, float]:
        """Those of FreeU's that the request names, by the names of models.base.FreeU."""
        factors = {name: getattr(self, f"freeu_{name}") for name in ("b1", "b2", "s1", "s2")}
        return {name: factor for name, factor in factors.items() if factor is not None}

    @property
    def multiscale(self) -> dict[str, Any]:
        """Multi-scale's settings, by the names of models.base.Multiscale."""
        names = ("factor", "fullres_start", "fullres_end", "intermittent")
        return {name: getattr(self, f"multiscale_{name}") for name in names}


KNOWN = (*GenerateRequest.model_fields, *LIGHTDIFFUSION, *CfgFree.model_fields, *ControlNet.model_fields)


def parse(body: dict[str, Any], known: Collection[str] = KNOWN, left_out: Sequence[str] = ()) -> GenerateRequest:
    """Raises Invalid, naming the first field at fault, what is wrong with it, and the others; Unsupported.

    known: the names among which the nearest one to an unknown field is looked for. left_out: what was left out before.
    """
    body, said = translated(body, LIGHTDIFFUSION)
    cfg_free = validated(CfgFree, {name: body.pop(name) for name in CfgFree.model_fields if name in body})
    if cfg_free.cfg_free_enabled:
        if "guidance_end" in body:
            raise Invalid("cfg_free_enabled sets guidance_end; give one.", field="cfg_free_enabled")
        body["guidance_end"] = cfg_free.cfg_free_start_percent / 100
    control_net = validated(ControlNet, {name: body.pop(name) for name in ControlNet.model_fields if name in body})
    control_net.put_into(body)
    for key in body:
        if key not in GenerateRequest.model_fields:
            nearest = difflib.get_close_matches(key[:LONGEST_NAME], known, n=1, cutoff=0)
            raise Invalid(
                f"There is no field {shown(key)!r}. The nearest known one is {nearest[0]!r}.", field=shown(key)
            )
    request = validated(GenerateRequest, body)
    request._left_out = (*left_out, *said)
    return request


def validated(model: type[Model], values: dict[str, Any]) -> Model:
    """Raises Invalid, as `parse` does."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid(error) from None


def _located(field: str, message: str) -> PydanticCustomError:
    """For a check on the whole object, which pydantic would otherwise pin on no field."""
    return PydanticCustomError(TOGETHER, "{message}", {"field": field, "message": message})
