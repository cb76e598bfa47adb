"""From what the widgets hold to a request body, and which of them a model can use.

Widget names are the API's field names wherever one widget stands for one field, so that a finished picture's settings
can be put back by name.
"""

from __future__ import annotations

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
DEFAULTS: dict[str, Any] = {
    "prompt": "a misty forest at twilight",
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
    "deepcache_enabled": False,
    **PRESETS["balanced"],
    "deepcache_schedule": None,
    "deepcache_guidance": None,
    "deepcache_forecast": True,
    "fbcache_enabled": True,
    "fbcache_threshold": 0.05,
    "fbcache_max_consecutive": None,
    "fbcache_forecast": True,
}
"""Every widget that a request is made of. None: the server's default, or a random seed."""

Model = Mapping[str, Any]
"""A row of GET /api/models."""


def body(values: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Of POST /api/jobs: only what the model can use, and nothing that was left to the server."""
    fields = ("prompt", "width", "height", "num_images", "steps", "guidance_scale", "seed", "sampler", "scheduler")
    request = {"model": model["name"], **{name: values[name] for name in fields}}
    request["enable_preview"] = values["enable_preview"]
    if reads_negative_prompt(model):
        request["negative_prompt"] = values["negative_prompt"]
    if no_deepcache(model) is None and values["deepcache_enabled"]:
        start, end = values["deepcache_window"]
        request |= {
            "deepcache_enabled": True,
            "deepcache_interval": values["deepcache_interval"],
            "deepcache_depth": values["deepcache_depth"],
            "deepcache_start_step": start,
            "deepcache_end_step": end,
            "deepcache_schedule": values["deepcache_schedule"],
            "deepcache_guidance": values["deepcache_guidance"],
            "cache_forecast": values["deepcache_forecast"],
        }
    if no_fbcache(model) is None:
        request["fbcache_enabled"] = values["fbcache_enabled"]
        if values["fbcache_enabled"]:
            request |= {
                "fbcache_threshold": values["fbcache_threshold"],
                "fbcache_max_consecutive": values["fbcache_max_consecutive"],
                "cache_forecast": values["fbcache_forecast"],
            }
    return {name: value for name, value in request.items() if value is not None}


def uncached(request: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """The request for the same pictures without a cache: the same in all but that, the seed being the one drawn."""
    plain = {name: value for name, value in request.items() if "cache" not in name}
    if "fbcache_enabled" in request:
        plain["fbcache_enabled"] = False
    return {**plain, "seed": answer["seeds"][0]}


def no_deepcache(model: Model) -> str | None:
    """Why the model cannot use DeepCache; None where it can."""
    if model["cache"] == "deepcache":
        return None
    remedy = " Use the First Block Cache below." if model["cache"] == "first_block" else ""
    return f"{model['name']} is a transformer, and DeepCache works on UNet models.{remedy}"


def no_fbcache(model: Model) -> str | None:
    """Why the model cannot use the first-block cache; None where it can."""
    if model["cache"] == "first_block":
        return None
    remedy = " Use DeepCache above." if model["cache"] == "deepcache" else ""
    return f"{model['name']} is a UNet, and the First Block Cache works on transformer models.{remedy}"


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
