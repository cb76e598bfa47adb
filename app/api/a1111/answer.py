"""What AUTOMATIC1111's clients read: pictures, `info` as a JSON string, progress, lists."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from pydantic import BaseModel, Field

from app import __version__, images
from app.api import outcome
from app.api.a1111.names import label_of
from app.api.a1111.payload import Payload
from app.api.desk import Waiting
from app.engine.base import EngineStatus, JobHandle, JobResult


class Drawn(BaseModel):
    """As txt2img and img2img answer there."""

    images: list[str] = Field(description="Base64, one a picture.")
    parameters: dict[str, Any] = Field(description="What was drawn with.")
    info: str = Field(description="JSON: AUTOMATIC1111's own keys, and under wavespeed the report of /api/generate.")


class Progress(BaseModel):
    """Of the caller's oldest request under way."""

    progress: float = Field(description="Share of its steps that are done, 0 to 1; 0 too where nothing is under way.")
    eta_relative: float = Field(description="Seconds, as the steps went so far.")
    state: dict[str, Any] = Field(description="job_count: the caller's requests under way; sampling_step of _steps.")
    current_image: str | None = Field(description="Base64 JPEG, where live_previews_enable was asked for.")
    textinfo: str | None = Field(description="What it waits for, if it does.")


def drawn(payload: Payload, handle: JobHandle, result: JobResult) -> dict[str, Any]:
    """`Drawn` as a dict. Its size makes it a thread's work."""
    pictures = [base64.b64encode(picture).decode("ascii") for picture in result.images]
    params = handle.job.params
    sampler = payload.sampler.name if payload.sampler is not None else label_of(params.sampler)
    shared = {
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "seed": params.seeds[0],
        "width": params.width,
        "height": params.height,
        "sampler_name": sampler,
        "cfg_scale": params.guidance_scale,
        "steps": params.steps,
        "batch_size": params.batch_size,
        "denoising_strength": params.img2img.denoise if params.img2img is not None else None,
        "styles": [],
        "restore_faces": False,
        "subseed": -1,
        "subseed_strength": 0,
        "seed_resize_from_w": 0,
        "seed_resize_from_h": 0,
    }
    texts = [images.metadata(handle.job, seed, result.cache)["parameters"] for seed in params.seeds]
    info = {
        **shared,
        "all_prompts": [params.prompt] * len(params.seeds),
        "all_negative_prompts": [params.negative_prompt] * len(params.seeds),
        "all_seeds": list(params.seeds),
        "all_subseeds": [-1] * len(params.seeds),
        "face_restoration_model": None,
        "sd_model_name": handle.job.model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "extra_generation_params": {"Schedule type": params.scheduler or "default"},
        "index_of_first_image": 0,
        "infotexts": texts,
        "job_timestamp": _stamp(),
        "clip_skip": params.clip_skip or 1,
        "is_using_inpainting_conditioning": False,
        "version": f"WaveSpeed {__version__}",
        "wavespeed": outcome.report(handle, result),
    }
    parameters = {**shared, "n_iter": len(params.seeds) // params.batch_size, "scheduler": params.scheduler}
    return {"images": pictures, "parameters": parameters, "info": json.dumps(info)}


def progress(waiting: list[Waiting], status: EngineStatus, *, with_image: bool) -> Progress:
    """How far the first of them is."""
    first = waiting[0] if waiting else None
    step = first.step if first is not None else None
    done, total = (step.index + 1, step.total) if step is not None else (0, 0)
    share = done / total if total else 0.0
    since = time.monotonic() - first.handle.started if first is not None and first.handle.started else 0.0
    preview = first.preview if first is not None and with_image else None
    return Progress(
        progress=share,
        eta_relative=round(since / share * (1 - share), 3) if share else 0.0,
        state={
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": first.handle.job.id if first is not None else "",
            "job_count": len(waiting),
            "job_timestamp": _stamp(),
            "job_no": 0,
            "sampling_step": done,
            "sampling_steps": total,
        },
        current_image=base64.b64encode(preview).decode("ascii") if preview is not None else None,
        textinfo=_waits_for(first, status) if first is not None and step is None else None,
    )


def _waits_for(waiting: Waiting, status: EngineStatus) -> str:
    if waiting.handle.place is not None:
        return f"waiting, number {waiting.handle.place} in the queue"
    loading = [device.loading for device in status.devices if device.loading]
    return f"loading {', '.join(loading)}" if loading else "starting"


def _stamp() -> str:
    return time.strftime("%Y%m%d%H%M%S")
