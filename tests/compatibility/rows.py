"""The document's compatibility list as data: each pair, the models it is tried on, the requests that try it.

The tests run every row through the HTTP API, `docs/compatibility.md` is printed from them:

    python -m tests.compatibility.page > docs/compatibility.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models.sampling.samplers import DIFFUSION

Cache = Literal["DeepCache", "FBCache"]

# What switches each cache on so that it can act on few steps and on random weights.
ON: Mapping[Cache, Mapping[str, Any]] = {
    "DeepCache": {"deepcache_enabled": True, "deepcache_interval": 2},
    "FBCache": {"fbcache_enabled": True, "fbcache_threshold": 1.0},
}
UNETS = ("sd15", "sd21", "sdxl")
TRANSFORMERS = ("flux-schnell", "flux-dev")
CHAT = ("flux2-klein", "flux2-klein-base", "z-image", "z-image-turbo")
PICTURE = "<a picture>"  # stands for one in base64
WEIGHTS = "<the model's own>"  # stands for the name of a LoRA or an embedding that was made for the model


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the document's list. `beside` is what the cache is tried with, in the document's words.

    `fields`: the requests' fields beside the cache's own; each is tried on each of `models`. `remedy`: of a pair that
    is refused, the field that the error names and words of its message. `passes`: those that must each have reused.
    `note`: what a reader should know.
    """

    cache: Cache
    beside: str
    models: tuple[str, ...]
    fields: tuple[Mapping[str, Any], ...] = ({},)
    remedy: tuple[str, str] | None = None
    passes: tuple[str, ...] = ()
    note: str = ""


Group = Literal["Checkpoint", "LoRA", "Embedding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRow:
    """One kind of file. `key`: one of its tensors. `said`: its refusal, or what `warnings` says beside the picture."""

    group: Group
    kind: str
    model: str
    key: str
    said: str = ""
    refused: bool = False


LORA = {"loras": [{"name": WEIGHTS, "weight": 0.8}]}
EMBEDDING = {"prompt": f"a forest in {WEIGHTS}", "negative_prompt": f"({WEIGHTS}:1.2)"}
IMG2IMG = {"img2img_enabled": True, "img2img_image": PICTURE}
INPAINT = {**IMG2IMG, "mask": PICTURE}
MULTISCALE = {"multiscale_enabled": True, "multiscale_fullres_start": 1, "multiscale_fullres_end": 1}
HIRES = {"hires_fix": True, "width": 256, "height": 256}
ATTENTION = {"attention": "auto"}
STABLE_FAST = {"stable_fast": True}
COMPILED = {"compile": True}
PARTLY = {"guidance_start": 0.25, "guidance_end": 0.75, "steps": 8}
REFINED = {"refiner_model": "sdxl-refiner", "refiner_switch": 0.5, "steps": 8}
FEW = {**LORA, "guidance_scale": 1.0, "steps": 4}
LCM = {**FEW, "sampler": "lcm"}
LIGHTNING = {**FEW, "sampler": "euler", "scheduler": "sgm_uniform"}
STACK = {**LORA, **MULTISCALE, **HIRES}

ROWS = (
    Row(cache="DeepCache", beside="Stable Diffusion 1.5", models=("sd15", "tiny-sd")),
    Row(cache="DeepCache", beside="Stable Diffusion 2.1", models=("sd21",)),
    Row(cache="DeepCache", beside="SDXL", models=("sdxl",)),
    Row(
        cache="DeepCache",
        beside="All samplers (Euler, DPM++, etc.)",
        models=("sd15",),
        fields=tuple({"sampler": sampler} for sampler in DIFFUSION),
    ),
    Row(cache="DeepCache", beside="LoRA adapters", models=(*UNETS, "tiny-sd"), fields=(LORA,)),
    Row(
        cache="DeepCache",
        beside="LCM and Lightning LoRAs with their samplers",
        models=(*UNETS, "tiny-sd"),
        fields=(LCM, LIGHTNING),
        note="four steps, no guidance",
    ),
    Row(cache="DeepCache", beside="Textual inversion embeddings", models=UNETS, fields=(EMBEDDING,)),
    Row(cache="DeepCache", beside="HiresFix", models=("tiny-sd",), fields=(HIRES,), passes=("base", "hires_fix")),
    Row(
        cache="DeepCache",
        beside="ADetailer",
        models=("sd15", "sdxl"),
        fields=({"adetailer": True},),
        note="no face is found in these pictures",
    ),
    Row(cache="DeepCache", beside="Multi-scale diffusion", models=(*UNETS, "tiny-sd"), fields=(MULTISCALE,)),
    Row(
        cache="DeepCache",
        beside="SageAttention/SpargeAttn",
        models=("sd15", "sdxl"),
        fields=(ATTENTION,),
        note="the kernel that is installed; SDPA where none is, as in the tests",
    ),
    Row(
        cache="DeepCache",
        beside="Stable-Fast",
        models=("small-sd",),
        fields=(STABLE_FAST, {**STABLE_FAST, **LORA}, {**STABLE_FAST, **ATTENTION}),
        note="compiled layers, without code generation in the tests",
    ),
    Row(
        cache="DeepCache",
        beside="Compiled layers (`compile`)",
        models=("small-sd",),
        fields=(COMPILED, {**COMPILED, **LORA}),
        note="without code generation in the tests",
    ),
    Row(
        cache="DeepCache",
        beside="HiresFix, Multi-scale diffusion and LoRA adapters together",
        models=("tiny-sd",),
        fields=(STACK,),
        passes=("base", "hires_fix"),
    ),
    Row(cache="DeepCache", beside="Guidance in a part of the run", models=(*UNETS, "tiny-sd"), fields=(PARTLY,)),
    Row(cache="DeepCache", beside="FreeU", models=(*UNETS, "tiny-sd"), fields=({"freeu": True},)),
    Row(
        cache="DeepCache",
        beside="SDXL's refiner",
        models=("sdxl",),
        fields=(
            REFINED,
            {**REFINED, **PARTLY},
            {**REFINED, "refiner_switch": 0.7, "hires_fix": True, "width": 96, "height": 96},
        ),
        passes=("base", "refiner"),
    ),
    Row(
        cache="DeepCache",
        beside="Flux models (use FBCache instead)",
        models=(*TRANSFORMERS, "tiny-flux"),
        remedy=("deepcache_enabled", "use FBCache"),
    ),
    Row(
        cache="DeepCache",
        beside="Img2Img mode (can cause artifacts)",
        models=("tiny-sd", "sdxl"),
        fields=(IMG2IMG,),
        remedy=("deepcache_enabled", "Set deepcache_enabled to false"),
    ),
    Row(
        cache="DeepCache",
        beside="Inpainting (a mask is img2img)",
        models=("tiny-sd",),
        fields=(INPAINT,),
        remedy=("deepcache_enabled", "Set deepcache_enabled to false"),
    ),
    Row(cache="FBCache", beside="Flux models", models=(*TRANSFORMERS, "tiny-flux")),
    Row(cache="FBCache", beside="FLUX.2 klein and Z-Image", models=CHAT),
    Row(
        cache="FBCache",
        beside="Img2Img and inpainting of Z-Image",
        models=("z-image-turbo",),
        fields=(IMG2IMG, INPAINT),
    ),
    Row(
        cache="FBCache",
        beside="Img2Img of FLUX.2 klein (its pipelines take a picture for a reference)",
        models=("flux2-klein", "flux2-klein-base"),
        fields=(IMG2IMG,),
        remedy=("img2img_enabled", "Leave img2img_enabled out"),
    ),
    Row(
        cache="FBCache",
        beside="SageAttention/SpargeAttn",
        models=TRANSFORMERS,
        fields=(ATTENTION,),
        note="the kernel that is installed; SDPA where none is, as in the tests",
    ),
    Row(
        cache="FBCache",
        beside="All Flux-compatible features",
        models=("flux-dev",),
        fields=(LORA, IMG2IMG, MULTISCALE, {"adetailer": True}, {"sampler": "heun"}),
    ),
    Row(
        cache="FBCache",
        beside="Compiled blocks (`compile`)",
        models=("flux-dev",),
        fields=(COMPILED, {**COMPILED, **LORA}),
        note="without code generation in the tests",
    ),
    Row(
        cache="FBCache",
        beside="Inpainting",
        models=("flux-schnell", "tiny-flux"),
        fields=(INPAINT, {**INPAINT, "inpaint_area": "masked", "mask_fill": "noise"}),
        passes=("inpaint",),
    ),
    Row(
        cache="FBCache",
        beside="Guidance in a part of the run",
        models=("flux-schnell",),
        fields=({**PARTLY, "guidance_scale": 3.0},),
        note="where a Flux is not distilled to its guidance",
    ),
    Row(
        cache="FBCache",
        beside="FreeU (a transformer has no skips to weigh)",
        models=("flux-dev",),
        fields=({"freeu": True},),
        remedy=("freeu", "Leave it out"),
    ),
    Row(
        cache="FBCache",
        beside="A refiner (Flux has none)",
        models=("flux-dev",),
        fields=({"refiner_model": "sdxl-refiner"},),
        remedy=("refiner_model", "Leave refiner_model out"),
    ),
    Row(
        cache="FBCache",
        beside="SD1.5/SDXL (use DeepCache instead)",
        models=(*UNETS, "tiny-sd"),
        remedy=("fbcache_enabled", "Use DeepCache"),
    ),
    Row(
        cache="FBCache",
        beside="Stable-Fast (Flux not supported by Stable-Fast)",
        models=("flux-dev", "tiny-flux"),
        fields=(STABLE_FAST,),
        remedy=("stable_fast", "Leave it out"),
    ),
)
