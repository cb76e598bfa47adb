"""From what the widgets hold to a request's body and back, and which of them a model can use.

Widget names are the API's field names wherever one widget stands for one field, so that a finished picture's settings
can be put back by name.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "balanced": {"deepcache_interval": 3, "deepcache_depth": 2, "deepcache_window": (0, 1000)},
    "max_speed": {"deepcache_interval": 5, "deepcache_depth": 3, "deepcache_window": (0, 1000)},
    "max_quality": {"deepcache_interval": 2, "deepcache_depth": 1, "deepcache_window": (0, 1000)},
    "partial": {"deepcache_interval": 3, "deepcache_depth": 2, "deepcache_window": (200, 800)},
}
PRESET_NAMES = {
    "balanced": "Balanced",
    "max_speed": "Maximum speed",
    "max_quality": "Maximum quality",
    "partial": "Partial",
}
OFF, BALANCED = "off", "balanced"
SPEEDS: tuple[float | str, ...] = (OFF, 1.5, 2.0, BALANCED, 2.5, 3.0, 4.0, 5.0, 6.0)
"""Places of the speed slider: no cache, the balanced preset, and wished speeds (`cache_speedup`)."""
ASPECTS = {"1:1": 1.0, "4:3": 4 / 3, "3:2": 1.5, "16:9": 16 / 9, "3:4": 3 / 4, "2:3": 2 / 3, "9:16": 9 / 16}
DEFAULTS: dict[str, Any] = {
    "prompt": "a stormy sea at sunset",
    "negative_prompt": "",
    "model": None,
    "width": 768,
    "height": 512,
    "num_images": 1,
    "steps": None,
    "guidance_scale": None,
    "seed": None,
    "sampler": None,
    "scheduler": None,
    "enable_preview": True,
    "speed": BALANCED,
    "by_hand": False,
    "deepcache_enabled": True,
    **PRESETS["balanced"],
    "deepcache_schedule": None,
    "deepcache_guidance": None,
    "deepcache_forecast": True,
    "fbcache_enabled": True,
    "fbcache_threshold": 0.05,
    "fbcache_max_consecutive": None,
    "fbcache_forecast": True,
    "hires_fix": False,
    "adetailer": False,
    "multiscale_enabled": False,
    "upscale": None,
    "loras": [],
    "img2img_denoise": 0.6,
    "inpaint_area": "whole",
    "control_model": None,
    "control_edges": True,
    "control_weight": 1.0,
    "control_span": (0.0, 1.0),
}
"""Every widget that a request is made of. None: the server's default, or a random seed."""

Model = Mapping[str, Any]
"""A row of GET /api/models."""
_AS_THEY_ARE = (
    "prompt", "width", "height", "num_images", "steps", "guidance_scale", "seed", "sampler", "scheduler",
    "enable_preview", "hires_fix", "adetailer", "multiscale_enabled", "upscale",
)  # fmt: skip
_TOGETHER = 4  # pictures of one batch: what a server denoises at once unless told otherwise
_SIDES = 32  # pixels; sides of an aspect's size are multiples
_AREA = 768 * 512  # pixels of an embedded model's picture, which is enlarged to them


def body(
    values: Mapping[str, Any],
    model: Model,
    source: bytes | None = None,
    mask: bytes | None = None,
    control: bytes | None = None,
) -> dict[str, Any]:
    """Of POST /api/jobs: only what the model can use, and nothing that was left to the server.

    `source`: an encoded picture to begin from; `mask`: another one, white where it is drawn anew.
    `control`: one that the chosen ControlNet sees.
    """
    request = {"model": model["name"], **{name: values[name] for name in _AS_THEY_ARE}}
    request["batch_size"] = min(values["num_images"], _TOGETHER)
    if reads_negative_prompt(model):
        request["negative_prompt"] = values["negative_prompt"]
    if values["loras"]:
        request["loras"] = [{"name": name, "weight": values.get(f"lora-{name}", 1.0)} for name in values["loras"]]
    if source is not None:
        request |= {
            "img2img_enabled": True,
            "img2img_denoise": values["img2img_denoise"],
            "img2img_image": _text(source),
        }
        if mask is not None:
            request |= {"mask": _text(mask), "inpaint_area": values["inpaint_area"]}
    if control is not None:
        start, end = values["control_span"]
        unit = {"model": values["control_model"], "image": _text(control), "weight": values["control_weight"]}
        request["control"] = [{**unit, "start": start, "end": end, "edges": values["control_edges"]}]
    request |= _cache(values, model, source is not None)
    off = (None, False)  # what is not asked for, but for what is off instead of on
    return {
        name: value
        for name, value in request.items()
        if name == "fbcache_enabled" or not any(value is one for one in off)
    }


def _text(picture: bytes) -> str:
    return base64.b64encode(picture).decode("ascii")


def _cache(values: Mapping[str, Any], model: Model, from_picture: bool) -> dict[str, Any]:
    unet, transformer = no_deepcache(model) is None, no_fbcache(model) is None
    if no_cache(model, from_picture=from_picture) is not None:
        return {}
    if not values["by_hand"]:
        match values["speed"]:
            case "off":
                return {"fbcache_enabled": False} if transformer else {}
            case "balanced":
                return {"deepcache_enabled": True, "deepcache_preset": BALANCED} if unet else {"fbcache_enabled": True}
            case speed:
                return {"cache_speedup": speed}
    if unet and values["deepcache_enabled"]:
        start, end = values["deepcache_window"]
        return {
            "deepcache_enabled": True,
            "deepcache_interval": values["deepcache_interval"],
            "deepcache_depth": values["deepcache_depth"],
            "deepcache_start_step": start,
            "deepcache_end_step": end,
            "deepcache_schedule": values["deepcache_schedule"],
            "deepcache_guidance": values["deepcache_guidance"],
            **({} if values["deepcache_forecast"] else {"cache_forecast": False}),
        }
    if transformer and values["fbcache_enabled"]:
        return {
            "fbcache_enabled": True,
            "fbcache_threshold": values["fbcache_threshold"],
            "fbcache_max_consecutive": values["fbcache_max_consecutive"],
            **({} if values["fbcache_forecast"] else {"cache_forecast": False}),
        }
    return {"fbcache_enabled": False} if transformer else {}


def widgets(fields: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """What the widgets hold for a request of `fields`: of a job, or of a picture that says how it was drawn.

    The inverse of `body`, but for the pictures. Fields that no widget shows are left out.
    """
    values = {**DEFAULTS, **{name: fields[name] for name in DEFAULTS if fields.get(name) is not None}}
    del values["enable_preview"]  # changes nothing of the picture
    loras = fields.get("loras") or []
    values["loras"] = [lora["name"] for lora in loras]
    values |= {f"lora-{lora['name']}": float(lora.get("weight", 1.0)) for lora in loras}
    values["guidance_scale"] = None if values["guidance_scale"] is None else float(values["guidance_scale"])
    values["deepcache_forecast"] = values["fbcache_forecast"] = bool(fields.get("cache_forecast", True))
    knobs = any(name in fields for name in ("deepcache_interval", "deepcache_depth", "fbcache_threshold"))
    values["by_hand"] = knobs
    if knobs:
        values["deepcache_enabled"] = bool(fields.get("deepcache_enabled"))
        values["deepcache_window"] = (fields.get("deepcache_start_step", 0), fields.get("deepcache_end_step", 1000))
    elif speed := fields.get("cache_speedup"):
        values["speed"] = min((one for one in SPEEDS if isinstance(one, float)), key=lambda one: abs(one - speed))
    elif preset := fields.get("deepcache_preset"):
        values |= {"by_hand": preset != BALANCED, **PRESETS[preset]}
    elif not fields.get("deepcache_enabled") and (
        no_deepcache(model) is None or fields.get("fbcache_enabled") is False
    ):
        values["speed"] = OFF
    return values


def size_of(aspect: float, model: Model) -> tuple[int, int]:
    """Width and height in pixels of about as many pixels as the model is made for."""
    native_width, native_height = model["native_size"]
    area = _AREA if model["render_sizes"] else native_width * native_height
    width, height = (
        max(_SIDES, round(side / _SIDES) * _SIDES) for side in (math.sqrt(area * aspect), math.sqrt(area / aspect))
    )
    return min(width, 2048), min(height, 2048)


def aspect_of(width: int, height: int, model: Model) -> str | None:
    """The aspect whose size this is."""
    return next((name for name, aspect in ASPECTS.items() if size_of(aspect, model) == (width, height)), None)


def no_deepcache(model: Model) -> str | None:
    """Why the model cannot use DeepCache; None where it can."""
    if model["cache"] == "deepcache":
        return None
    return f"{model['name']} is a transformer, and DeepCache works on UNet models."


def no_fbcache(model: Model) -> str | None:
    """Why the model cannot use the first-block cache; None where it can."""
    if model["cache"] == "first_block":
        return None
    return f"{model['name']} is a UNet, and the First Block Cache works on transformer models."


def no_cache(model: Model, *, from_picture: bool) -> str | None:
    """Why the next picture is drawn without a cache whatever the speed says; None where it is not."""
    if no_deepcache(model) is None and from_picture:
        return "DeepCache does not go with a picture to start from: the next one is drawn without a cache."
    if model["cache"] not in ("deepcache", "first_block"):
        return f"{model['name']} is drawn without a cache: none works on it."
    return None


def reads_negative_prompt(model: Model) -> bool:
    return bool(model["cache"] != "first_block")


def reuse_cost(model: Model, depth: int) -> tuple[int | None, float]:
    """Branch at which `depth` cuts the model's UNet, and a reused step's share of a computed one.

    The deepest branch that costs at most 1/(depth + 2) of a full step; None and 0 where no branch is as cheap and the
    prediction itself is forecast.
    """
    cheap = [row for row in model["branches"] if row["reuse_cost"] <= 1 / (depth + 2)]
    if not cheap:
        return None, 0.0
    row = max(cheap, key=lambda row: int(row["branch"]))
    return int(row["branch"]), float(row["reuse_cost"])
