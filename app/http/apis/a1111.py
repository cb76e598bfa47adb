"""/sdapi/v1: txt2img, img2img, progress, interrupt, options and the lists that clients fetch."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Annotated, Any, get_args

import psutil
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from app import __version__
from app.engine.types import EngineStatus
from app.errors import Invalid, Unsupported, shown
from app.http.apis.a1111_payload import (
    OVERRIDES,
    SCRIPT,
    Img2ImgOptions,
    Options,
    payload_schema,
    read_payload,
)
from app.http.foreign import SETTINGS, same
from app.http.pages import resident_bytes
from app.http.render import IMAGE_BODY, errors, json_body
from app.http.request import asked, interrupted, owner_of, read_object, request_id_of, service_of, texts_of, waited
from app.http.resolve import Adapters, served
from app.http.schemas import KNOWN
from app.infotext import AUTOMATIC, SAMPLERS, SCHEDULERS, infotext, restored, sampler_label, scheduler_label
from app.jobs.record import Drawn, JobRecord
from models.base import ResamplingName


class Pictures(BaseModel):
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


class PngInfo(BaseModel):
    """What a PNG tells of itself."""

    info: str = Field(description="Its text `parameters`; empty where there is none.")
    items: dict[str, str] = Field(description="All its texts, by name.")
    parameters: dict[str, str] = Field(description="The settings that stand in info.")


API = "a1111"
router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
NONE_HERE = (
    "sd-vae",
    "latent-upscale-modes",
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "prompt-styles",
    "extensions",
)
"""Lists that front ends fetch when they start, and that are empty here."""
REFRESHED = ("checkpoints", "loras", "embeddings", "vae")
MOST_CHOICES = 10_000  # callers whose choice of a model is kept; the one made longest ago goes first


def schemas() -> dict[str, dict[str, Any]]:
    """The bodies' JSON Schemas by name, for OpenAPI."""
    return {kind.title: payload_schema(kind) for kind in (Options, Img2ImgOptions)}


def _drawing(summary: str, kind: type[Options]) -> dict[str, Any]:
    """What OpenAPI says of an address that draws."""
    return {
        "summary": summary,
        "response_model": Pictures,
        "responses": errors(401, 404, 409, 413, 422, 429, 500, 503, 504),
        "openapi_extra": json_body(kind.title),
    }


@router.post("/txt2img", **_drawing("Draw pictures, as AUTOMATIC1111 does", Options))
async def txt2img(request: Request) -> Response:
    """The fields of POST /api/generate can stand beside AUTOMATIC1111's, in override_settings, or in
    alwayson_scripts.WaveSpeed.args[0]; the report is info.wavespeed.
    """
    return await _draw(request, Options)


@router.post("/img2img", **_drawing("Draw a picture over, as AUTOMATIC1111 does", Img2ImgOptions))
async def img2img(request: Request) -> Response:
    """As txt2img, from one picture, whole or within a mask."""
    return await _draw(request, Img2ImgOptions)


async def _draw(request: Request, kind: type[Options]) -> Response:
    drawn = await waited(request, await _submitted(request, kind))
    return await asyncio.to_thread(lambda: JSONResponse(_answer(drawn)))


async def _submitted(request: Request, kind: type[Options]) -> JobRecord:
    service = service_of(request)
    async with asked(request) as body:
        fields, reading = read_payload(body, kind, service.chosen.get(owner_of(request)))
        job = await service.resolver.job(fields, request_id_of(request), reading)
    return await service.jobs.submit(job, owner_of(request), ephemeral=True, api=API)


@router.get("/progress", summary="How far the caller's request is", responses=errors(401, 422))
async def how_far(
    request: Request, skip_current_image: Annotated[bool, Query(description="Leave the preview out.")] = False
) -> Progress:
    """The caller is known by its key, without keys by its address."""
    service = service_of(request)
    records = service.jobs.of(owner_of(request), API)
    return _progress(records, service.engine.status(), with_image=not skip_current_image)


@router.post("/interrupt", summary="Give the caller's oldest request up", responses=errors(401))
async def interrupt(request: Request) -> dict[str, str]:
    """It is answered 409. Nobody else's is touched; where there is none, nothing happens."""
    interrupted(request, API)
    return {}


@router.get("/options", summary="The settings of a request that names none", responses=errors(401, 503))
async def options(request: Request) -> dict[str, Any]:
    """Each can be set in a request's override_settings; the model also by POST."""
    service = service_of(request)
    return {
        "sd_model_checkpoint": service.chosen.get(owner_of(request), service.engine.catalogue().default),
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "live_previews_enable": False,
    }


@router.post(
    "/options",
    summary="Choose the model of the caller's later requests",
    responses=errors(401, 404, 413, 422, 503),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}},
)
async def set_options(request: Request) -> None:
    """By sd_model_checkpoint, which null takes back; for the caller alone, under /sdapi. Another setting is refused
    unless it changes nothing: it belongs into override_settings.
    """
    now, wanted = await options(request), await read_object(request)
    for name, value in wanted.items():
        nothing = name in SETTINGS and SETTINGS[name].asks_for_nothing(value)
        if name == "sd_model_checkpoint" or nothing or (name in now and same(value, now[name])):
            continue
        where = "override_settings of the request" if name in OVERRIDES or name in KNOWN else "the server's environment"
        raise Unsupported(f"{shown(name)} is not set for all requests to come. Give it in {where}.", field=shown(name))
    if "sd_model_checkpoint" in wanted:
        _choose(request, wanted["sd_model_checkpoint"])


def _choose(request: Request, name: object) -> None:
    service, owner = service_of(request), owner_of(request)
    if not isinstance(name, str | None):
        raise Invalid("sd_model_checkpoint is a name from sd-models, or null.", field="sd_model_checkpoint")
    model = served(name, service.engine.catalogue(), "sd_model_checkpoint") if name else None
    service.chosen.pop(owner, None)
    if model is not None:
        service.chosen[owner] = model.name
    if len(service.chosen) > MOST_CHOICES:
        del service.chosen[next(iter(service.chosen))]


@router.get("/sd-models", summary="The models, as AUTOMATIC1111 lists them", responses=errors(401, 503))
async def sd_models(request: Request) -> list[dict[str, str | None]]:
    """Shorter than GET /api/models; no path is told."""
    names = service_of(request).engine.catalogue().models
    nothing = {"hash": None, "sha256": None, "config": None}
    return [{"title": name, "model_name": name, "filename": name, **nothing} for name in names]


@router.get("/samplers", summary="The samplers, by AUTOMATIC1111's names", responses=errors(401, 503))
async def samplers(request: Request) -> list[dict[str, Any]]:
    """Those that some model here takes; which one takes which is in GET /api/models."""
    ours = {name for model in service_of(request).engine.catalogue().models.values() for name in model.samplers}
    return [
        {
            "name": sampler.name,
            "aliases": list(sampler.aliases),
            "options": {"scheduler": sampler.automatic} if sampler.automatic else {},
        }
        for sampler in SAMPLERS
        if sampler.ours in ours
    ]


@router.get("/schedulers", summary="The schedulers, by AUTOMATIC1111's names", responses=errors(401))
async def schedulers() -> list[dict[str, Any]]:
    """Which sampler takes which is in GET /api/models."""
    nothing = {"aliases": None, "default_rho": None, "need_inner_model": None}
    return [{"name": scheduler.name, "label": scheduler.label, **nothing} for scheduler in SCHEDULERS]


@router.get("/scripts", summary="The one script that alwayson_scripts takes", responses=errors(401))
async def scripts() -> dict[str, list[str]]:
    """Its one argument is an object with fields of POST /api/generate."""
    return {"txt2img": [SCRIPT.lower()], "img2img": [SCRIPT.lower()]}


@router.get("/loras", summary="The LoRAs that a prompt can name", responses=errors(401))
def loras(request: Request) -> list[dict[str, Any]]:
    """As <lora:name:0.8>."""
    names = Adapters(service_of(request).settings).loras.files()
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


@router.get("/upscalers", summary="What enlarges a picture, by name", responses=errors(401))
def upscalers(request: Request) -> list[dict[str, Any]]:
    """For extra-single-image and, but for None and Nearest, hr_upscaler. A network's scale is seen when it is used."""
    names = ["None", *get_args(ResamplingName), *Adapters(service_of(request).settings).upscalers.files()]
    return [{"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": None} for name in names]


@router.get("/embeddings", summary="The embeddings that a prompt can name", responses=errors(401))
def embeddings(request: Request) -> dict[str, dict[str, Any]]:
    """By its file's name, in a prompt. Their sizes are seen when they are used."""
    unread = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
    return {"loaded": dict.fromkeys(Adapters(service_of(request).settings).embeddings.files(), unread), "skipped": {}}


@router.get("/script-info", summary="That script's argument", responses=errors(401))
async def script_info() -> list[dict[str, Any]]:
    """Its one argument is an object with fields of POST /api/generate."""
    argument = {"label": "fields of POST /api/generate", "value": {}}
    bounds = dict.fromkeys(("minimum", "maximum", "step", "choices"))
    return [
        {"name": SCRIPT.lower(), "is_alwayson": True, "is_img2img": img2img, "args": [{**argument, **bounds}]}
        for img2img in (False, True)
    ]


@router.get("/cmd-flags", summary="How the server was started, as AUTOMATIC1111 says it", responses=errors(401))
async def cmd_flags() -> dict[str, bool]:
    """Of its flags those that have a meaning here."""
    return {"api": True, "nowebui": True}


@router.get("/memory", summary="Main memory and the GPUs', in bytes", responses=errors(401))
def memory(request: Request) -> dict[str, dict[str, Any]]:
    """GET /api/telemetry says more. `ram`: of the server and its workers; `cuda`: of all GPUs together."""
    status = service_of(request).engine.status()
    ram, used = psutil.virtual_memory().total, resident_bytes(status)
    gpus = [device.memory for device in status.devices if device.memory.total]
    cuda: dict[str, Any] = {"error": "unavailable"}
    if gpus:
        total, taken, allocated, reserved, peak = (
            sum(getattr(gpu, name) for gpu in gpus) for name in ("total", "used", "allocated", "reserved", "peak")
        )
        cuda = {
            "system": {"free": total - taken, "used": taken, "total": total},
            "allocated": {"current": allocated, "peak": peak},
            "reserved": {"current": reserved, "peak": None},
        }
    return {"ram": {"free": ram - used, "used": used, "total": ram}, "cuda": cuda}


@router.post("/png-info", summary="What stands in a PNG", responses=errors(401, 413, 422), openapi_extra=IMAGE_BODY)
async def png_info(request: Request) -> PngInfo:
    """A picture of another kind has nothing to tell."""
    texts = await texts_of(request)
    info = texts.get("parameters", "")
    return PngInfo(info=info, items=texts, parameters=restored(info))


async def _refreshed() -> None:
    """Folders are looked at all the time: there is nothing to do."""


for _name in REFRESHED:
    router.add_api_route(
        f"/refresh-{_name}", _refreshed, methods=["POST"], summary="Taken", responses=errors(401), name=_name
    )


async def _nothing() -> list[Any]:
    """There is none here."""
    return []


for _name in NONE_HERE:
    router.add_api_route(f"/{_name}", _nothing, summary="Always empty", responses=errors(401), name=_name)


def _answer(drawn: Drawn) -> dict[str, Any]:
    """`Pictures` as a dict. Its size makes it a thread's work."""
    pictures = [base64.b64encode(picture).decode("ascii") for picture in drawn.images]
    job, params = drawn.drawing, drawn.drawing.params
    same = ("prompt", "negative_prompt", "width", "height", "steps", "batch_size")
    shared = {
        **{name: getattr(params, name) for name in same},
        "seed": params.seeds[0],
        "sampler_name": sampler_label(params.sampler),
        "cfg_scale": params.guidance_scale,
        "denoising_strength": params.img2img.denoise if params.img2img is not None else None,
        "styles": [],
        "restore_faces": False,
        "subseed": -1,
        "subseed_strength": 0,
        "seed_resize_from_w": 0,
        "seed_resize_from_h": 0,
    }
    info = {
        **shared,
        "all_prompts": [params.prompt] * len(params.seeds),
        "all_negative_prompts": [params.negative_prompt] * len(params.seeds),
        "all_seeds": list(params.seeds),
        "all_subseeds": [-1] * len(params.seeds),
        "face_restoration_model": None,
        "sd_model_name": job.model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "extra_generation_params": {"Schedule type": scheduler_label(params.scheduler) or AUTOMATIC.label},
        "index_of_first_image": 0,
        "infotexts": [infotext(params, seed, job.model, job.strategy.name) for seed in params.seeds],
        "job_timestamp": _stamp(),
        "clip_skip": params.clip_skip or 1,
        "is_using_inpainting_conditioning": False,
        "version": f"WaveSpeed {__version__}",
        "wavespeed": dict(drawn.report),
    }
    parameters = {**shared, "n_iter": len(params.seeds) // params.batch_size, "scheduler": params.scheduler}
    return {"images": pictures, "parameters": parameters, "info": json.dumps(info)}


def _progress(records: list[JobRecord], status: EngineStatus, *, with_image: bool) -> Progress:
    """How far the first of them is."""
    first = records[0] if records else None
    done, total = (first.step, first.total or 0) if first is not None else (0, 0)
    share = done / total if total else 0.0
    since = time.time() - first.started if first is not None and first.started else 0.0
    preview = first.events.newest("preview") if first is not None and with_image else None
    return Progress(
        progress=share,
        eta_relative=round(since / share * (1 - share), 3) if share else 0.0,
        state={
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": first.id if first is not None else "",
            "job_count": len(records),
            "job_timestamp": _stamp(),
            "job_no": 0,
            "sampling_step": done,
            "sampling_steps": total,
        },
        current_image=preview.data["image"] if preview is not None else None,
        textinfo=_waits_for(first, status) if first is not None and not done else None,
    )


def _waits_for(record: JobRecord, status: EngineStatus) -> str:
    if record.handle is not None and record.handle.place is not None:
        return f"waiting, number {record.handle.place} in the queue"
    loading = [device.loading for device in status.devices if device.loading]
    return f"loading {', '.join(loading)}" if loading else "starting"


def _stamp() -> str:
    return time.strftime("%Y%m%d%H%M%S")
