"""From a request that is well-formed to a job that a model can do: defaults, compatibility, what is not there yet."""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from app.engine.types import Catalogue, Engine, Job, ModelInfo
from app.errors import Incompatible, Invalid, ModelNotFound, Unsupported, shown
from app.http import pictures
from app.http.pictures import OURS, Reading
from app.http.schemas import GenerateRequest
from app.infotext import pair, scheduler_alone
from app.settings import Settings
from cache import CacheStrategy, DeepCache, FirstBlockCache, NoCache
from models.adapters.embedding import mentioned
from models.adapters.files import UnknownFile, WeightsFolder
from models.base import Embedding, FreeU, GenerationParams, Lora, Multiscale, Refiner, Upscaler
from models.embedded import CONTROLNETS
from models.errors import UnsupportedSampler
from models.families import FAMILIES
from models.sampling.samplers import check as check_sampler
from models.text.prompt import BadPrompt
from models.text.prompt import parse as parse_prompt
from models.tuning.choice import Choice, Wish, choose, faults

SEEDS = 2**32

_OF_DEEPCACHE = {name for name in GenerateRequest.model_fields if name.startswith("deepcache_")}


class Adapters:
    """The operator's folders."""

    def __init__(self, settings: Settings) -> None:
        self.loras = WeightsFolder(settings.lora_folder, "LoRA")
        self.embeddings = WeightsFolder(settings.embedding_folder, "embedding")
        self.upscalers = WeightsFolder(settings.upscaler_folder, "upscaler")
        self.controlnets = WeightsFolder(settings.control_folder, "ControlNet", diffusers=True, embedded=CONTROLNETS)

    def named(self, request: GenerateRequest) -> tuple[Lora, ...]:
        """The LoRAs of the request. Raises Invalid for a name that is not a file of the folder."""
        found = []
        for index, lora in enumerate(request.loras):
            name, path = _found(self.loras, lora.name, f"loras.{index}.name")
            found.append(Lora(name=name, path=path, weight=lora.weight, text_weight=lora.text_weight))
        return tuple(found)

    def upscaler(self, wanted: str | None, field: str) -> Upscaler | None:
        """The one that the field names. Raises Invalid."""
        if wanted is None:
            return None
        name, path = _found(self.upscalers, wanted, field)
        return Upscaler(name=name, path=path)

    def steering(self, request: GenerateRequest, model: ModelInfo) -> list[tuple[str, Path]]:
        """Name and path of each of the request's ControlNets. Raises Invalid, Incompatible."""
        if request.control and not FAMILIES[model.family].controlnets:
            fitting = ", ".join(name for name, family in FAMILIES.items() if family.controlnets)
            raise Incompatible(
                f"{model.name} is {model.family}; those with ControlNets are {fitting}. Leave control out.",
                field="control",
            )
        return [
            _found(self.controlnets, one.model, f"control.{index}.model") for index, one in enumerate(request.control)
        ]

    def mentioned(self, request: GenerateRequest, model: ModelInfo) -> tuple[tuple[Embedding, ...], list[str]]:
        """The embeddings whose names the prompts hold, and what to tell the user of them."""
        found = mentioned(self.embeddings.files(), (request.prompt, request.negative_prompt))
        if not found or model.cache != "first_block":
            return found, []
        names = ", ".join(embedding.name for embedding in found)
        return (), [f"{model.name} takes no embeddings; these names were read as plain words: {names}."]


def _found(folder: WeightsFolder, name: str, field: str) -> tuple[str, Path]:
    try:
        return folder.find(name)
    except UnknownFile as error:
        raise Invalid(str(error), field=field) from None


def resolve(
    request: GenerateRequest, catalogue: Catalogue, settings: Settings, job_id: str, reading: Reading = OURS
) -> Job:
    """Raises ModelNotFound, Incompatible, Unsupported or Invalid; the message names the remedy."""
    if request.rerender is not None:
        raise Unsupported("rerender is a field of POST /api/generate and POST /api/jobs alone.", field="rerender")
    model = pick_model(request, catalogue)
    _check_compatible(request, model)
    refiner = _refiner(request, model, catalogue)
    _check_size(request, model)
    sampler, scheduler = _sampler(request, model)
    check_prompts(request, model)
    steps = model.steps if request.steps is None else request.steps
    adapters = Adapters(settings)
    steering = adapters.steering(request, model)
    img2img = pictures.img2img(request, steps, reading)
    control = pictures.controls(request, steering, reading)
    warnings = _warnings(request, model)
    embeddings, said = adapters.mentioned(request, model)
    warnings += said
    batch_size = min(request.batch_size, request.num_images)
    if batch_size > settings.max_batch_size:
        batch_size = settings.max_batch_size
        warnings.append(f"This server denoises at most {batch_size} images together; batch_size was lowered to it.")
    first = request.seed if request.seed is not None and request.seed >= 0 else secrets.randbelow(SEEDS)
    guidance_scale = model.guidance_scale if request.guidance_scale is None else request.guidance_scale
    choice = Choice(steps, _strategy(request, model))
    if request.cache_speedup is not None:
        wish = Wish(request.cache_speedup, request.cache_floor, steps, guidance_scale, sampler, scheduler)
        choice = choose(wish, model.name, model.cache, model.profile)
    warnings += [*choice.warnings, *faults(model.name, model.profile, choice.strategy)]
    params = GenerationParams(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        steps=choice.steps,
        guidance_scale=guidance_scale,
        seeds=tuple((first + index) % SEEDS for index in range(request.num_images)),
        batch_size=batch_size,
        sampler=sampler,
        scheduler=scheduler,
        loras=adapters.named(request),
        embeddings=embeddings,
        clip_skip=request.clip_skip,
        guidance_rescale=request.guidance_rescale,
        guidance_start=request.guidance_start,
        guidance_end=request.guidance_end,
        freeu=_freeu(request, model),
        attention=request.attention,
        compiled=request.compile or request.stable_fast,
        img2img=img2img,
        control=control,
        refiner=refiner,
        hires_fix=request.hires_fix,
        hires_upscaler=adapters.upscaler(request.hires_upscaler, "hires_upscaler") if request.hires_fix else None,
        upscale=adapters.upscaler(request.upscale, "upscale"),
        adetailer=request.adetailer,
        face_detector=settings.face_detector if request.adetailer else None,
        multiscale=Multiscale(**request.multiscale) if request.multiscale_enabled else None,
        preview=request.enable_preview,
    )
    return Job(
        id=job_id,
        model=model.name,
        params=params,
        strategy=choice.strategy,
        chosen=choice.report,
        output_format=request.output_format,
        warnings=tuple(warnings),
        deadline_seconds=_deadline(request, settings),
    )


def _deadline(request: GenerateRequest, settings: Settings) -> float:
    """Seconds."""
    if request.deadline_seconds is None:
        return settings.deadline_seconds
    if request.deadline_seconds > settings.deadline_seconds:
        raise Invalid(
            f"deadline_seconds is at most {settings.deadline_seconds:g} on this server.", field="deadline_seconds"
        )
    return request.deadline_seconds


@dataclass(frozen=True, slots=True)
class Resolver:
    """`resolve` for the event loop. `decoders`: the few threads that decode the pictures that clients send."""

    engine: Engine
    settings: Settings
    decoders: Executor

    async def job(self, request: GenerateRequest, job_id: str, reading: Reading = OURS) -> Job:
        """An upload is decoded aside, once the engine has said that there is room for a job.

        Raises what `resolve` and `engine.admit` raise, and NotReady while the models are not known yet.
        """
        catalogue = self.engine.catalogue()
        work = partial(resolve, request, catalogue, self.settings, job_id, reading)
        if request.img2img_image is None and not request.control:
            return work()
        self.engine.admit(pick_model(request, catalogue).name)
        return await asyncio.get_running_loop().run_in_executor(self.decoders, work)


def pick_model(request: GenerateRequest, catalogue: Catalogue) -> ModelInfo:
    name = request.model
    if name is None:
        name = catalogue.default_flux if request.flux_enabled else catalogue.default
        if name is None:
            raise Incompatible("No Flux model is configured; leave flux_enabled out.", field="flux_enabled")
    model = served(name, catalogue)
    if request.flux_enabled and not model.family.startswith("flux"):
        raise Incompatible(
            f"flux_enabled asks for a Flux model, and {model.name} is none. Leave one of the two out.",
            field="flux_enabled",
        )
    return model


def served(name: str, catalogue: Catalogue, field: str = "model") -> ModelInfo:
    """Raises ModelNotFound."""
    model = catalogue.models.get(name)
    if model is None and name in catalogue.unserved:
        raise ModelNotFound(f"{shown(name)!r} is not served. {catalogue.unserved[name]}", field=field)
    if model is None:
        known = ", ".join(catalogue.models)
        raise ModelNotFound(f"There is no model {shown(name)!r}. There is: {known}.", field=field)
    return model


def _refiner(request: GenerateRequest, model: ModelInfo, catalogue: Catalogue) -> Refiner | None:
    if FAMILIES[model.family].needs_picture and not request.img2img_enabled:
        raise Incompatible(
            f"{model.name} is a refiner, which draws over pictures alone. Name it as refiner_model beside an SDXL "
            "model, or send a picture with img2img_enabled.",
            field="model",
        )
    if request.refiner_model is None:
        return None
    second, fitting = served(request.refiner_model, catalogue, "refiner_model"), FAMILIES[model.family].refiners
    if not fitting:
        raise Incompatible(
            f"Nothing goes on from the latents of {model.name}, which is {model.family}. Leave refiner_model out, or "
            "name an SDXL model as model.",
            field="refiner_model",
        )
    if second.family not in fitting or second.name == model.name:
        others = [one.name for one in catalogue.models.values() if one.family in fitting and one.name != model.name]
        kind = "the model itself" if second.name == model.name else second.family
        raise Incompatible(
            f"{second.name} is {kind}; what {model.name} began is gone on with by another model that is "
            f"{' or '.join(sorted(fitting))}. There is: {', '.join(others) or 'none'}.",
            field="refiner_model",
        )
    if second.inpaints:
        raise Incompatible(
            f"{second.name} was trained to inpaint, and goes on with nothing. Name another refiner_model.",
            field="refiner_model",
        )
    return Refiner(model=second.name, switch=request.refiner_switch)


def _check_compatible(request: GenerateRequest, model: ModelInfo) -> None:
    is_transformer = model.cache == "first_block"
    if request.deepcache_enabled and is_transformer:
        raise Incompatible(
            f"DeepCache works on UNet models, and {model.name} is a transformer. "
            "Leave deepcache_enabled out and use FBCache (fbcache_enabled), which is on by default there.",
            field="deepcache_enabled",
        )
    if request.fbcache_enabled and not is_transformer:
        raise Incompatible(
            f"FBCache works on transformer models, and {model.name} is a UNet. Use DeepCache (deepcache_enabled).",
            field="fbcache_enabled",
        )
    if request.deepcache_enabled and request.img2img_enabled:
        raise Incompatible(
            "DeepCache can cause artifacts in img2img. Set deepcache_enabled to false.", field="deepcache_enabled"
        )
    if request.cache_speedup is not None and (request.img2img_enabled or model.inpaints):
        raise Incompatible(
            "cache_speedup is measured on pictures that begin in noise. Leave cache_speedup out and give fewer steps.",
            field="cache_speedup",
        )
    if request.deepcache_enabled and model.inpaints:
        raise Incompatible(
            f"DeepCache can cause artifacts in inpainting, which is all that {model.name} was trained for. Set "
            "deepcache_enabled to false.",
            field="deepcache_enabled",
        )
    if request.multiscale_enabled and model.inpaints:
        raise Incompatible(
            f"{model.name} was trained to inpaint and is shown the mask beside the latents, which small steps have not "
            "got. Set multiscale_enabled to false, or take a model that was not.",
            field="multiscale_enabled",
        )
    for name in ("img2img_enabled", "hires_fix", "adetailer"):
        if getattr(request, name) and not FAMILIES[model.family].draws_over:
            raise Incompatible(
                f"{model.name} draws from noise alone: {model.family} has no pipeline that draws over a picture. Leave "
                f"{name} out, or take a model of another family.",
                field=name,
            )
    if request.stable_fast and is_transformer:
        raise Incompatible(
            f"stable_fast is for UNet models, and {model.name} is a transformer. Leave it out, or set compile.",
            field="stable_fast",
        )
    for name, neutral in (("clip_skip", 1), ("guidance_rescale", 0), ("freeu", False)):
        if getattr(request, name) not in (None, neutral) and is_transformer:
            raise Incompatible(
                f"{name} works on UNet models, and {model.name} is a transformer. Leave it out.", field=name
            )
    for name in ("compile", "stable_fast"):
        if getattr(request, name) and model.compilation is not None:
            raise Unsupported(model.compilation, field=name)
    if (reason := model.attention.get(request.attention)) is not None:
        raise Unsupported(reason, field="attention")


def _check_size(request: GenerateRequest, model: ModelInfo) -> None:
    for field in ("width", "height"):
        pixels, multiple = getattr(request, field), model.size_multiple
        if pixels % multiple:
            below = max(pixels // multiple * multiple, -(-64 // multiple) * multiple)
            raise Invalid(
                f"{field} must be a multiple of {multiple} for {model.name}; {pixels} is not. "
                f"{below} would be one, or {below + multiple}.",
                field=field,
            )


def _freeu(request: GenerateRequest, model: ModelInfo) -> FreeU | None:
    """The request's factors, the others as published for the model's family."""
    published = FAMILIES[model.family].freeu if request.freeu else None
    return None if published is None else replace(published, **request.freeu_factors)


def _sampler(request: GenerateRequest, model: ModelInfo) -> tuple[str | None, str | None]:
    """Sampler and scheduler by our names; those that AUTOMATIC1111 has for them ("DPM++ 2M Karras") are taken too."""
    sampler, scheduler = request.sampler, request.scheduler
    if sampler is not None and sampler not in model.samplers:
        with suppress(Invalid):
            named, theirs = pair(sampler, scheduler)
            if named.ours in model.samplers:
                sampler, scheduler = named.ours, theirs
    elif scheduler is not None:
        with suppress(Invalid):
            scheduler = scheduler_alone(scheduler) or scheduler
    try:
        check_sampler(model.samplers, sampler, scheduler)
    except UnsupportedSampler as error:
        unknown = sampler is not None and sampler not in model.samplers
        raise Invalid(str(error), field="sampler" if unknown else "scheduler") from None
    return sampler, scheduler


def _strategy(request: GenerateRequest, model: ModelInfo) -> CacheStrategy:
    forecast = request.cache_forecast
    if request.deepcache_enabled:
        named: dict[str, Any] = {"schedule": request.deepcache_schedule, "guidance": request.deepcache_guidance}
        chosen = {name: value for name, value in named.items() if value is not None}  # the others are its own to choose
        return DeepCache(**request.deepcache, **chosen, forecast=forecast)
    if model.cache == "first_block" and request.fbcache_enabled is not False:
        return FirstBlockCache(request.fbcache_threshold, request.fbcache_max_consecutive, forecast)
    return NoCache()


def _warnings(request: GenerateRequest, model: ModelInfo) -> list[str]:
    """What was left out of the request; and a cache setting that nothing will read, which may be one meant to be on."""
    given, warnings = request.model_fields_set, list(request.left_out)
    named = {field for field in given if getattr(request, field) is not None}
    changed = {field for field in given if getattr(request, field) != GenerateRequest.model_fields[field].default}

    def unless(is_on: bool, fields: set[str], reason: str) -> None:
        if fields and not is_on:
            warnings.append(f"{', '.join(sorted(fields))} had no effect: {reason}.")

    deepcache = (named & _OF_DEEPCACHE) - {"deepcache_enabled"}
    unless(request.deepcache_enabled, deepcache, "deepcache_enabled is not true")
    has_fbcache = model.cache == "first_block"
    reason = "FBCache is off" if has_fbcache else f"{model.name} has no FBCache"
    first_block = given & {"fbcache_threshold", "fbcache_max_consecutive"}
    unless(has_fbcache and request.fbcache_enabled is not False, first_block, reason)
    unless(request.img2img_enabled, changed & {"img2img_image", "img2img_denoise"}, "img2img_enabled is not true")
    masked = changed & {"mask_blur", "mask_fill", "inpaint_area", "inpaint_padding"}
    unless(pictures.inpaints(request), masked, "there is no mask")
    padding = changed & {"inpaint_padding"} if pictures.inpaints(request) else set()
    unless(request.inpaint_area == "masked", padding, "inpaint_area is not masked")
    multiscale = changed & {f"multiscale_{name}" for name in request.multiscale}
    unless(request.multiscale_enabled, multiscale, "multiscale_enabled is not true")
    unless(request.hires_fix, named & {"hires_upscaler"}, "hires_fix is not true")
    unless(request.freeu, named & {f"freeu_{name}" for name in request.freeu_factors}, "freeu is not true")
    unless(request.cache_speedup is not None, named & {"cache_floor"}, "cache_speedup is not given")
    unless(not isinstance(_strategy(request, model), NoCache), named & {"cache_forecast"}, "no cache is on")
    return warnings


def check_prompts(request: GenerateRequest, model: ModelInfo) -> None:
    """Raises Invalid for weights that nothing can be drawn with. To a transformer, brackets are plain text."""
    if model.cache == "first_block":
        return
    for name in ("prompt", "negative_prompt"):
        try:
            parse_prompt(getattr(request, name))
        except BadPrompt as error:
            raise Invalid(str(error), field=name) from None
