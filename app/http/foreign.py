"""Fields of other APIs: what each of their values comes to here. One table an API, read by `translated`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.errors import Invalid, Unsupported


@dataclass(frozen=True, slots=True)
class Foreign:
    """A field that ours has not got, or has by another name.

    neutral: the values that ask for nothing, null always among them; None for a field that asks for nothing whatever
        its value.
    remedy: a sentence on what to do instead.
    ignored: the values that change no picture. They are left out, and the answer's warnings say so.
    ours: the field here that every other value goes to. Where there is none such a value is refused: it would change
        the picture.
    beside: a field of ours; unless that is true, this one asks for nothing.
    """

    neutral: tuple[object, ...] | None = ()
    remedy: str = ""
    ignored: tuple[object, ...] = ()
    ours: str | None = None
    beside: str | None = None

    def asks_for_nothing(self, value: object) -> bool:
        return value is None or self.neutral is None or _among(value, self.neutral)

    def schema(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """JSON Schema of the values that are taken; `fields` are those of ours."""
        if self.ours is not None:
            values = {"anyOf": [fields[self.ours], {"enum": [*(self.neutral or ()), None]}]}
            return {**values, "description": f"Another name of {self.ours}."}
        words = {"description": f"Changes nothing here. {self.remedy}"}
        if self.neutral is None or self.beside is not None:
            return words
        return {**words, "enum": [*self.neutral, *self.ignored, None]}


def translated(
    body: Mapping[str, Any], table: Mapping[str, Foreign], where: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """The body by our names, and a sentence on each field that was left out although it asked for something.

    where: what the fields are in, for the names in messages, with a dot at its end.
    Raises Unsupported for a value that would change the picture, Invalid for one field by two names.
    """
    rest = {name: value for name, value in body.items() if name not in table}
    asking = {name: value for name, value in body.items() if name in table and not table[name].asks_for_nothing(value)}
    for name, value in asking.items():
        if (ours := table[name].ours) is None:
            continue
        if ours in rest:
            raise Invalid(f"{where}{name} and {ours} are the same field; give one.", field=f"{where}{name}")
        rest[ours] = value
    said = []
    for name, value in asking.items():
        field = table[name]
        if field.ours is not None or (field.beside is not None and rest.get(field.beside) is not True):
            continue
        if not _among(value, field.ignored):
            wording = ", ".join(map(_written, (*(field.neutral or ()), *field.ignored))) or "null"
            raise Unsupported(
                f"{where}{name} can only be {wording}: anything else would have no effect. {field.remedy}",
                field=f"{where}{name}",
            )
        said.append(f"{where}{name} had no effect. {field.remedy}")
    return rest, said


def whole_numbers(body: Mapping[str, Any]) -> dict[str, Any]:
    """4.0 as 4: JSON knows one kind of number, and some clients write each with a point."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in body.items()
    }


def same(one: object, other: object) -> bool:
    """In Python true is 1; in JSON it is not."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _among(value: object, values: tuple[object, ...]) -> bool:
    return any(same(value, one) for one in values)


def _written(value: object) -> str:
    return repr(value).lower() if isinstance(value, bool) else repr(value)


_NO_CONTROL = "There is no ControlNet here."
_NO_MERGING = "Tokens are not merged here; set deepcache_enabled for speed."
_RESCALED = "Set guidance_rescale instead."
_OWN_NOISE = "The noise is the sampler's."
_KEPT_WEIGHTS = "What weights are kept in belongs to the model, in the server's models file."
LIGHTDIFFUSION = {
    "cfg_scale": Foreign(ours="guidance_scale"),
    "residual_diff_threshold": Foreign(ours="fbcache_threshold"),  # of ComfyUI's nodes
    "torch_compile": Foreign(ours="compile"),
    "hiresfix": Foreign(ours="hires_fix"),
    "model_path": Foreign(("",), ours="model"),
    "img2img_mode": Foreign(ours="img2img_enabled"),
    "input_image_path": Foreign(("",), "A path is not read: send the picture in img2img_image."),
    "enable_multiscale": Foreign(ours="multiscale_enabled"),
    "multiscale_intermittent_fullres": Foreign(ours="multiscale_intermittent"),
    "multiscale_preset": Foreign(
        ("disabled",), "Set multiscale_factor and the fields beside it.", beside="multiscale_enabled"
    ),
    "enhance_prompt": Foreign((False,), "A prompt is drawn as it is written."),
    "reuse_seed": Foreign((False,), "Give seed: an answer tells it."),
    "realistic_model": Foreign((False,), "Name the model."),
    "keep_models_loaded": Foreign((True,), "Models stay loaded while there is room.", ignored=(False,)),
    "preview_fidelity": Foreign(("balanced",), "Previews are small JPEGs.", ignored=("low", "high")),
    "persist_prompt_history": Foreign((False,), "No prompt is kept.", ignored=(True,)),
    "tome_enabled": Foreign((False,), _NO_MERGING),
    "tome_ratio": Foreign(None, _NO_MERGING),
    "tome_max_downsample": Foreign(None, _NO_MERGING),
    "batched_cfg": Foreign((True,), "Guidance is one batch here.", ignored=(False,)),
    "dynamic_cfg_rescaling": Foreign((False,), _RESCALED),
    "dynamic_cfg_method": Foreign(None, _RESCALED),
    "dynamic_cfg_percentile": Foreign(None, _RESCALED),
    "dynamic_cfg_target_scale": Foreign(None, _RESCALED),
    "adaptive_noise_enabled": Foreign((False,), _OWN_NOISE),
    "adaptive_noise_method": Foreign(None, _OWN_NOISE),
    "controlnet_enabled": Foreign((False,), _NO_CONTROL),
    "controlnet_model": Foreign(None, _NO_CONTROL),
    "controlnet_strength": Foreign(None, _NO_CONTROL),
    "controlnet_type": Foreign(None, _NO_CONTROL),
    "vae_autotune": Foreign((False,), "The decoder is run as it is.", ignored=(True,)),
    "weight_quantization": Foreign(("none",), _KEPT_WEIGHTS),
    "fp8_inference": Foreign((False,), _KEPT_WEIGHTS),
}
"""LightDiffusion-Next's names that POST /api/generate takes beside its own: GenerateRequest of its server.py."""


IMAGES = {
    "quality": Foreign(
        ("auto", "standard"),
        "Pictures have one quality: set steps.",
        ignored=("low", "medium", "high", "xhigh", "max", "hd"),
    ),
    "style": Foreign(("vivid",), "Say it in the prompt.", ignored=("natural",)),
    "background": Foreign(("auto", "opaque"), "Pictures here are opaque."),
    "moderation": Foreign(("auto", "low"), "Nothing is moderated here."),
    "output_compression": Foreign((100,), "jpeg and webp are written at quality 95."),
    "complexity": Foreign((), "Leave it out."),
    "frame_count": Foreign((), "Leave it out; pictures here do not move."),
    "frame_duration_ms": Foreign((), "Leave it out; pictures here do not move."),
    "svg": Foreign((), "Leave it out; pictures here are png, jpeg or webp."),
    "enable_preview": Foreign((False,), "Set stream and partial_images."),
}
"""Of the OpenAI images API that are not in app/http/apis/openai.py, for generations."""
EDITS = IMAGES | {
    "input_fidelity": Foreign((), "Set img2img_denoise: how much is drawn anew.", ignored=("low", "high")),
    "markup": Foreign((), "Send a mask, and say in the prompt what is drawn there."),
}
"""And for edits."""


class CfgFree(BaseModel):
    """LightDiffusion's words for `guidance_end`: guidance fades out from there on; here it ends."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    cfg_free_enabled: bool = Field(False, description="Whether cfg_free_start_percent is read.")
    cfg_free_start_percent: float = Field(70.0, ge=0, le=100, description="guidance_end, in percent.")
