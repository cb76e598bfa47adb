"""What made a picture, in AUTOMATIC1111's words: names of samplers, and the text inside a PNG.

Names, aliases and what `Automatic` stands for: modules/sd_samplers_kdiffusion.py, sd_samplers_timesteps.py and
sd_schedulers.py of its version 1.10; the text: modules/processing.py, `create_infotext`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from app import __version__
from app.errors import Invalid, shown
from models.base import Control, FreeU, GenerationParams, Inpaint, Lora, Upscaler


@dataclass(frozen=True, slots=True)
class Sampler:
    """`ours`: its name here. `automatic`: the scheduler, by our name, that it has unless one is named.

    `eta`: its share of fresh noise a step, and whether another one would change anything.
    """

    name: str
    ours: str
    aliases: tuple[str, ...]
    automatic: str | None = None
    eta: float | None = None


@dataclass(frozen=True, slots=True)
class Scheduler:
    name: str
    label: str
    ours: str | None


SAMPLERS = (
    Sampler("DPM++ 2M", "dpmpp_2m", ("k_dpmpp_2m",), "karras"),
    Sampler("DPM++ SDE", "dpmpp_sde", ("k_dpmpp_sde",), "karras", eta=1.0),
    Sampler("DPM++ 2M SDE", "dpmpp_2m_sde", ("k_dpmpp_2m_sde",), "exponential", eta=1.0),
    Sampler("DPM++ 3M SDE", "dpmpp_3m_sde", ("k_dpmpp_3m_sde",), "exponential", eta=1.0),
    Sampler("Euler a", "euler_ancestral", ("k_euler_a", "k_euler_ancestral"), eta=1.0),
    Sampler("Euler", "euler", ("k_euler",)),
    Sampler("LMS", "lms", ("k_lms",)),
    Sampler("Heun", "heun", ("k_heun",)),
    Sampler("DPM2", "dpm2", ("k_dpm_2",), "karras"),
    Sampler("DPM2 a", "dpm2_ancestral", ("k_dpm_2_a",), "karras", eta=1.0),
    Sampler("LCM", "lcm", ("k_lcm",)),
    Sampler("DDIM", "ddim", ("ddim",), eta=0.0),
    Sampler("PLMS", "pndm", ("plms",)),
    Sampler("UniPC", "unipc", ("unipc",)),
    Sampler("DEIS", "deis", ()),
)
AUTOMATIC = Scheduler("automatic", "Automatic", None)
SCHEDULERS = (
    AUTOMATIC,
    Scheduler("uniform", "Uniform", "normal"),
    Scheduler("normal", "Normal", "normal"),
    Scheduler("karras", "Karras", "karras"),
    Scheduler("exponential", "Exponential", "exponential"),
    Scheduler("sgm_uniform", "SGM Uniform", "sgm_uniform"),
    Scheduler("align_your_steps", "Align Your Steps", "ays"),
    Scheduler("beta", "Beta", "beta"),
)
_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d+)x(\d+)")
_JOINERS = "\u200c\u200d"
_HIDING = ("Cc", "Cf", "Cs")
_SAMPLERS = {word.lower(): sampler for sampler in SAMPLERS for word in (sampler.name, sampler.ours, *sampler.aliases)}
_SCHEDULERS = {
    word.lower(): scheduler
    for scheduler in SCHEDULERS
    for word in (scheduler.name, scheduler.label, scheduler.ours or scheduler.name)
}


def pair(sampler: str, scheduler: str | None, *, field: str = "sampler_name") -> tuple[Sampler, str | None]:
    """The sampler, and the scheduler by our name, None for the model's own.

    `sampler` may end in a scheduler's label ("DPM++ 2M Karras"), as the names of older versions do. Raises Invalid.
    """
    named = _scheduler(scheduler)
    base, suffix = sampler, None
    for one in SCHEDULERS[1:]:
        for word in (one.label, one.name):
            if sampler.lower().endswith(f" {word.lower()}"):
                base, suffix = sampler[: -len(word) - 1], one
    found = _SAMPLERS.get(base.lower())
    if found is None:
        raise Invalid(
            f"There is no sampler {shown(sampler)!r} here. There is: {', '.join(one.name for one in SAMPLERS)}.",
            field=field,
        )
    if suffix is not None and named is not AUTOMATIC and named != suffix:
        raise Invalid(
            f"{sampler} names the scheduler {suffix.label} already, and scheduler {named.label}; give one of them.",
            field="scheduler",
        )
    chosen = suffix or named
    return found, found.automatic if chosen is AUTOMATIC else chosen.ours


def scheduler_alone(scheduler: str | None) -> str | None:
    """Our name of a scheduler that comes without a sampler. Raises Invalid."""
    return _scheduler(scheduler).ours


def sampler_label(ours: str | None) -> str | None:
    """What AUTOMATIC1111 calls a sampler of ours."""
    return next((sampler.name for sampler in SAMPLERS if sampler.ours == ours), ours)


def scheduler_label(ours: str | None) -> str | None:
    """What AUTOMATIC1111 calls a scheduler of ours, the later one where it has two names."""
    return next((scheduler.label for scheduler in reversed(SCHEDULERS) if ours and scheduler.ours == ours), ours)


def _scheduler(name: str | None) -> Scheduler:
    found = _SCHEDULERS.get((name or AUTOMATIC.name).lower())
    if found is None:
        labels = ", ".join(one.label for one in SCHEDULERS)
        raise Invalid(f"There is no scheduler {shown(name or '')!r} here. There is: {labels}.", field="scheduler")
    return found


def infotext(params: GenerationParams, seed: int, model: str, strategy: str) -> str:
    """The text that AUTOMATIC1111 writes into a PNG, so that what reads its pictures restores ours.

    What a request left to the model, such as its sampler, is left out: a reader keeps its own then.
    """
    hires, img2img = params.hires_fix, params.img2img
    width, height = (params.width // 2, params.height // 2) if hires else (params.width, params.height)
    settings = {
        "Steps": params.steps,
        "Sampler": sampler_label(params.sampler),
        "Schedule type": scheduler_label(params.scheduler),
        "CFG scale": f"{params.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": model,
        "Denoising strength": f"{img2img.denoise:g}" if img2img is not None else "0.5" if hires else None,
        **(_inpaint(img2img.inpaint) if img2img is not None and img2img.inpaint is not None else {}),
        "Clip skip": params.clip_skip,
        "Skip Early CFG": f"{params.guidance_start:g}" if params.guidance_start else None,
        "Guidance end": f"{params.guidance_end:g}" if params.guidance_end < 1 else None,
        "Refiner": None if params.refiner is None else _quoted(params.refiner.model),
        "Refiner switch at": None if params.refiner is None else f"{params.refiner.switch:g}",
        "Hires upscale": 2 if hires else None,
        "Hires upscaler": (_file(params.hires_upscaler) or "Lanczos") if hires else None,
        "Postprocess upscaler": _file(params.upscale),
        **_freeu(params.freeu),
        **{f"ControlNet {index}": _control(control) for index, control in enumerate(params.control)},
        "Cache": strategy,
        "Version": f"WaveSpeed {__version__}",
    }
    tags = "".join(f" {_tag(lora)}" for lora in params.loras)
    # One line each, so that a prompt cannot pose as settings to those who read this text line by line.
    lines = [f"{_one_line(params.prompt)}{tags}"]
    if params.negative_prompt:
        lines.append(f"Negative prompt: {_one_line(params.negative_prompt)}")
    lines.append(", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None))
    return "\n".join(lines)


def _file(upscaler: Upscaler | None) -> str | None:
    return None if upscaler is None else _quoted(upscaler.name)


def _quoted(name: str) -> str:
    """In quotation marks where a reader would take a part of it for a setting."""
    name = _one_line(name)
    return json.dumps(name) if set(name) & set(',:"') else name


def _inpaint(inpaint: Inpaint) -> dict[str, str | int | None]:
    """What AUTOMATIC1111 writes of a mask; its defaults are left out, but for the blur."""
    masked = inpaint.padding is not None
    return {
        "Mask blur": inpaint.blur,
        "Masked content": "latent noise" if inpaint.fill == "noise" else None,
        "Inpaint area": "Only masked" if masked else None,
        "Masked area padding": inpaint.padding,
    }


def _control(control: Control) -> str:
    """As AUTOMATIC1111 writes a unit: settings within a setting."""
    settings = {
        "Module": "canny" if control.edges else "none",
        "Model": _one_line(control.name),
        "Weight": f"{control.weight:g}",
        "Resize Mode": "Crop and Resize",
        "Guidance Start": f"{control.start:g}",
        "Guidance End": f"{control.end:g}",
        "Control Mode": "Balanced",
    }
    return json.dumps(", ".join(f"{key}: {value}" for key, value in settings.items()))


def _freeu(freeu: FreeU | None) -> dict[str, str]:
    """Its four factors, by name."""
    if freeu is None:
        return {}
    return {f"FreeU {name}": f"{factor:g}" for name, factor in asdict(freeu).items()}


def restored(text: str) -> dict[str, str]:
    """What `infotext` wrote, by AUTOMATIC1111's names; Size also as Size-1 and Size-2, as its reader has them.

    Text without a line of settings at its end is a prompt. Of whatever text, in time that grows with its length alone.
    """
    *lines, last = text.strip().split("\n")
    settings, at = {}, 0
    while found := _SETTING.match(last, at):
        name, value, at = found[1], found[2], found.end()
        with suppress(ValueError):
            value = str(json.loads(value)) if value.startswith('"') else value
        settings[name] = value.strip()
    if not settings.get("Steps", "").isdecimal() or at < len(last):
        settings, lines = {}, [*lines, last]
    for name, value in list(settings.items()):
        if size := _SIZE.fullmatch(value):
            settings |= {f"{name}-1": size[1], f"{name}-2": size[2]}
    prompt, _, negative = "\n".join(["", *lines]).partition("\nNegative prompt:")
    return {"Prompt": prompt.strip(), "Negative prompt": negative.strip(), **settings} if text else {}


def drawn_with(texts: Mapping[str, str]) -> dict[str, object]:
    """The settings in a PNG's text chunks, by the names of our fields: those of ours, else AUTOMATIC1111's."""
    with suppress(ValueError):
        ours = json.loads(texts.get("wavespeed", ""))
        if isinstance(ours, dict):
            return {name: value for name, value in ours.items() if value is not None}
    theirs = restored(texts.get("parameters", ""))
    found: dict[str, object] = {}
    for name, label in (("prompt", "Prompt"), ("negative_prompt", "Negative prompt"), ("model", "Model")):
        found |= {name: theirs[label]} if label in theirs else {}
    numbers = {"steps": "Steps", "seed": "Seed", "width": "Size-1", "height": "Size-2", "guidance_scale": "CFG scale"}
    for name, label in numbers.items():
        with suppress(KeyError, ValueError):
            found[name] = float(theirs[label]) if name == "guidance_scale" else int(theirs[label])
    with suppress(KeyError, Invalid):
        sampler, scheduler = pair(theirs["Sampler"], theirs.get("Schedule type"))
        found |= {"sampler": sampler.ours} | ({} if scheduler is None else {"scheduler": scheduler})
    return found


def fields_of(found: Mapping[str, object]) -> dict[str, object]:
    """What `drawn_with` found, as fields of a request."""
    names = ("prompt", "negative_prompt", "model", "width", "height", "steps", "guidance_scale", "guidance_rescale")
    finer = ("guidance_start", "guidance_end", "clip_skip", "sampler", "scheduler", "seed", "loras")
    fields = {name: found[name] for name in (*names, *finer) if name in found}
    match found.get("cache"):
        case {"chosen": {"asked_speedup": speedup, "asked_steps": steps, "floor_db": floor}}:
            fields |= {"cache_speedup": speedup, "steps": steps} | ({} if floor is None else {"cache_floor": floor})
        case {"strategy": "deepcache", "interval": interval, "depth": depth}:
            fields |= {"deepcache_enabled": True, "deepcache_interval": interval, "deepcache_depth": depth}
        case {"strategy": "first_block", "threshold": threshold}:
            fields |= {"fbcache_enabled": True, "fbcache_threshold": threshold}
        case {"strategy": "none"}:
            fields |= {"fbcache_enabled": False}
    return fields


def text_chunks(
    params: GenerationParams, seed: int, model: str, strategy: str, cache: Mapping[str, object]
) -> dict[str, str]:
    """A PNG's text chunks: `parameters`, which is `infotext`, and `wavespeed`, JSON with the cache's report."""
    asked = ("prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "sampler", "scheduler")
    finer = ("clip_skip", "guidance_rescale", "guidance_start", "guidance_end")
    report = {
        **{name: getattr(params, name) for name in (*asked, *finer)},
        "model": model,
        "seed": seed,
        "loras": [
            {"name": lora.name, "weight": lora.weight}
            | ({} if lora.text_weight is None else {"text_weight": lora.text_weight})
            for lora in params.loras
        ],
        "embeddings": [embedding.name for embedding in params.embeddings],
        "freeu": None if params.freeu is None else asdict(params.freeu),
        "control": [
            {name: getattr(one, name) for name in ("name", "weight", "start", "end", "edges")} for one in params.control
        ],
        "refiner": None if params.refiner is None else asdict(params.refiner),
        "cache": dict(cache),
        "version": __version__,
    }
    return {"parameters": infotext(params, seed, model, strategy), "wavespeed": json.dumps(report)}


def _tag(lora: Lora) -> str:
    """As AUTOMATIC1111 writes it, where the text encoders' strength stands first."""
    text = "" if lora.text_weight is None else f"{lora.text_weight:g}:"
    return f"<lora:{lora.name}:{text}{lora.weight:g}>"


def _one_line(text: str) -> str:
    """Without control characters and those that turn the direction of text, which hide what stands there.

    Joiners stay: emoji and several scripts are written with them. The JSON chunk keeps the text as it was.
    """
    kept = (char for char in " ".join(text.split()) if char in _JOINERS or unicodedata.category(char) not in _HIDING)
    return "".join(kept)
