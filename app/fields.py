"""The fields of a request as a type, for callers that a type checker looks after."""

from __future__ import annotations

from typing import Literal, TypedDict


class LoraField(TypedDict, total=False):
    name: str
    weight: float


class Fields(TypedDict, total=False):
    """All but the prompt; what each means stands in app/api/schemas.py and in the server's /docs."""

    negative_prompt: str
    model: str | None
    flux_enabled: bool
    width: int
    height: int
    num_images: int
    batch_size: int
    steps: int | None
    guidance_scale: float | None
    guidance_rescale: float
    clip_skip: int | None
    seed: int | None
    sampler: str | None
    scheduler: str | None
    deepcache_enabled: bool
    deepcache_preset: Literal["balanced", "max_speed", "max_quality", "partial"] | None
    deepcache_interval: int
    deepcache_depth: int
    deepcache_schedule: Literal["auto", "uniform"] | None
    deepcache_guidance: Literal["full", "reuse"] | None
    deepcache_start_step: int
    deepcache_end_step: int
    fbcache_enabled: bool | None
    fbcache_threshold: float
    fbcache_max_consecutive: int | None
    cache_forecast: Literal["none", "linear", "quadratic", "damped", "probe"] | None
    cache_correction: bool | None
    attention: Literal["auto", "sdpa", "sage", "sparge"]
    stable_fast: bool
    img2img_enabled: bool
    img2img_image: str | None
    img2img_denoise: float
    hires_fix: bool
    adetailer: bool
    multiscale_enabled: bool
    multiscale_factor: float
    multiscale_fullres_start: int
    multiscale_fullres_end: int
    multiscale_intermittent: bool
    loras: list[LoraField]
    enable_preview: bool
    deadline_seconds: float | None
    output_format: Literal["png", "jpeg", "webp"]
