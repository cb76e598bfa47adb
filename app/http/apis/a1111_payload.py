"""AUTOMATIC1111's payload → our request. What it asks for and we have not got is refused; what asks for nothing is not.

Its fields: modules/processing.py and modules/api/models.py of its version 1.10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from app.errors import Invalid, Unsupported, shown
from app.http.schemas import KNOWN, GenerateRequest, Name, Neutral, parse, request_schema, validated, without_neutral
from app.infotext import pair, scheduler_alone

SCRIPT = "WaveSpeed"
"""Under this name `alwayson_scripts` takes our own fields: {"WaveSpeed": {"args": [{"deepcache_enabled": true}]}}."""
OVERRIDES = {
    "sd_model_checkpoint": "model",
    "CLIP_stop_at_last_layers": "clip_skip",
    "samples_format": "output_format",
    "live_previews_enable": "enable_preview",
    "skip_early_cond": "guidance_start",
}
_NOT_SAVED = "Pictures are in the answer and kept nowhere."
_NO_INPAINTING = "There is no inpainting here."
_SAMPLER_NOISE = "Samplers here have no such setting."
NEUTRAL = {
    "styles": Neutral(([],), "Write the style into the prompt."),
    "subseed_strength": Neutral((0,), "Seeds are not mixed here."),
    "seed_resize_from_h": Neutral((0, -1), "Seeds are not resized here."),
    "seed_resize_from_w": Neutral((0, -1), "Seeds are not resized here."),
    "restore_faces": Neutral((False,), "Set adetailer, a field of ours, instead."),
    "tiling": Neutral((False,), "Pictures that tile are not drawn here."),
    "do_not_save_samples": Neutral((False, True), _NOT_SAVED),
    "do_not_save_grid": Neutral((False, True), _NOT_SAVED),
    "save_images": Neutral((False,), _NOT_SAVED),
    "send_images": Neutral((True,), _NOT_SAVED),
    "s_churn": Neutral((0,), _SAMPLER_NOISE),
    "s_tmin": Neutral((0,), _SAMPLER_NOISE),
    "s_tmax": Neutral((0,), _SAMPLER_NOISE),
    "s_noise": Neutral((1,), _SAMPLER_NOISE),
    "s_min_uncond": Neutral((0,), "Set guidance_end, a field of ours, instead."),
    "script_name": Neutral(("", "None"), "There are no scripts here but WaveSpeed, in alwayson_scripts."),
    "script_args": Neutral(([],), "There are no scripts here but WaveSpeed, in alwayson_scripts."),
    "refiner_checkpoint": Neutral(("", "None"), "There is no refiner here."),
    "disable_extra_networks": Neutral((False,), "Leave the LoRAs out of the prompt."),
    "comments": Neutral(({},), "Leave it out."),
    "infotext": Neutral(("",), "Send the settings as fields."),
    "firstpass_image": Neutral((), "Use img2img."),
    "firstphase_width": Neutral((0,), "Set enable_hr and hr_scale 2."),
    "firstphase_height": Neutral((0,), "Set enable_hr and hr_scale 2."),
    "override_settings_restore_afterwards": Neutral((True,), "Settings belong to their request here."),
}
NEUTRAL_IMG2IMG = NEUTRAL | {
    "mask": Neutral((), _NO_INPAINTING),
    "latent_mask": Neutral((), _NO_INPAINTING),
    "initial_noise_multiplier": Neutral((1,), "Set denoising_strength."),
    "include_init_images": Neutral((False,), "The picture is with you already."),
    "enable_hr": Neutral((False,), "Set hires_fix, a field of ours, instead."),
}
# Read by AUTOMATIC1111 only beside something that is refused here, or by models of another kind: whatever their value,
# they change nothing there either.
IDLE = {"subseed", "refiner_switch_at", "hr_cfg"}
_OF_INPAINTING = {"inpaint_full_res", "inpaint_full_res_padding", "inpainting_fill", "inpainting_mask_invert"}
_OF_MASKS = {"mask_blur", "mask_blur_x", "mask_blur_y", "mask_round"}
IDLE_IMG2IMG = IDLE | _OF_INPAINTING | _OF_MASKS | {"image_cfg_scale"}
_HIRES = "hires_fix here enlarges with Lanczos or an upscaler to twice the size and draws over it at half strength."
HIRES = {
    "hr_scale": Neutral((2,), _HIRES),
    "hr_upscaler": Neutral(("Lanczos",), _HIRES),
    "denoising_strength": Neutral((0.5,), _HIRES),
    "hr_second_pass_steps": Neutral((0,), _HIRES),
    "hr_resize_x": Neutral((0,), _HIRES),
    "hr_resize_y": Neutral((0,), _HIRES),
    "hr_checkpoint_name": Neutral(("", "Use same checkpoint"), _HIRES),
    "hr_sampler_name": Neutral(("", "Use same sampler"), _HIRES),
    "hr_scheduler": Neutral(("", "Use same scheduler"), _HIRES),
    "hr_prompt": Neutral(("",), _HIRES),
    "hr_negative_prompt": Neutral(("",), _HIRES),
}
_HIRES_DEFAULTS = {"hr_scale": 2.0, "hr_upscaler": "Latent", "denoising_strength": 0.75}
_NEUTRAL_OVERRIDES = {
    "sd_vae": Neutral(("Automatic", "None"), "A model is used with the VAE that it comes with."),
    "eta_noise_seed_delta": Neutral((0,), "Give another seed."),
}
_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>")
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Options(BaseModel):
    """What AUTOMATIC1111 names otherwise than we do, in both endpoints; `neutral` and `idle` are its other fields."""

    model_config = ConfigDict(strict=True, extra="forbid")
    title: ClassVar = "Txt2ImgRequest"
    neutral: ClassVar = NEUTRAL
    idle: ClassVar = IDLE

    sampler_name: Name | None = Field(None, description="As GET /sdapi/v1/samplers lists them; null: the model's own.")
    sampler_index: Name | None = Field(None, description="Read where sampler_name is null.")
    scheduler: Name | None = Field(None, description="As GET /sdapi/v1/schedulers lists them.")
    batch_size: int | None = Field(None, ge=1, le=10, description="Pictures denoised together.")
    n_iter: int | None = Field(None, ge=1, le=10, description="Batches; n_iter × batch_size is at most 10.")
    eta: _Share | None = Field(
        None, description="Only what the sampler does anyway: 1 if ancestral or SDE, 0 for DDIM."
    )
    denoising_strength: _Share | None = Field(None, description="Read by img2img, and with enable_hr.")
    enable_hr: bool | None = Field(None, description="hires_fix; width and height are those before it.")
    override_settings: dict[str, Any] | None = Field(
        None, description=f"{', '.join(OVERRIDES)}, and any field of POST /api/generate."
    )
    alwayson_scripts: dict[str, Any] | None = Field(
        None, description=f"{SCRIPT}: {{args: [{{…}}]}} with any field of POST /api/generate."
    )
    force_task_id: Annotated[str, Field(max_length=200)] | None = Field(None, description="Taken and not read.")


class Img2ImgOptions(Options):
    """And those of img2img alone."""

    title: ClassVar = "Img2ImgRequest"
    neutral: ClassVar = NEUTRAL_IMG2IMG
    idle: ClassVar = IDLE_IMG2IMG
    init_images: Annotated[list[str], Field(min_length=1, max_length=1)] = Field(
        description="One picture, base64 or a data URL. Never a path or a URL."
    )
    resize_mode: int | None = Field(
        None, ge=0, le=2, description="1 crops to the aspect; 0 and 2 only for a picture that has it already."
    )


def read_payload(body: dict[str, Any], kind: type[Options]) -> tuple[GenerateRequest, bool]:
    """The request; must the picture have the drawing's aspect already?

    Raises Invalid, Unsupported or Incompatible.
    """
    body = {name: value for name, value in without_neutral(body, kind.neutral).items() if name not in kind.idle}
    named = body.get("hr_upscaler")
    file = named if isinstance(named, str) and named != "Lanczos" and not named.startswith("Latent") else None
    if body.get("enable_hr") is True:
        without_neutral({**_HIRES_DEFAULTS, **body, **({"hr_upscaler": "Lanczos"} if file else {})}, HIRES)
    body = {name: value for name, value in body.items() if name not in HIRES or name == "denoising_strength"}
    options = validated(kind, {name: body.pop(name) for name in kind.model_fields if name in body})
    values = _Values(body)
    for name, value in (options.override_settings or {}).items():
        _override(values, name, value)
    _scripts(values, options.alwayson_scripts or {})
    _sampler(values, options)
    _number(values, options)
    if options.enable_hr:
        values.put("hires_fix", True, "enable_hr")
        if file:
            values.put("hires_upscaler", file, "hr_upscaler")
        for name in ("width", "height"):
            pixels = values.get(name, GenerateRequest.model_fields[name].default)
            values[name] = pixels * 2 if isinstance(pixels, int) else pixels
    if isinstance(options, Img2ImgOptions):
        denoise = 0.75 if options.denoising_strength is None else options.denoising_strength
        values.put("img2img_enabled", True, "init_images")
        values.put("img2img_image", options.init_images[0], "init_images")
        values.put("img2img_denoise", denoise, "denoising_strength")
    if isinstance(values.get("prompt"), str):
        _networks(values)
    fields = parse(values, (*KNOWN, *kind.model_fields, *kind.neutral, *kind.idle))
    # Only mode 1 cuts the picture there as it is cut here.
    return fields, isinstance(options, Img2ImgOptions) and options.resize_mode != 1


class _Values(dict[str, Any]):
    """Our fields, from wherever in the payload they come."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        # null is AUTOMATIC1111's word for "the default", also where ours knows none.
        super().__init__({name: value for name, value in body.items() if value is not None})

    def put(self, name: str, value: object, origin: str) -> None:
        if name in self:
            raise Invalid(f"{origin} says {name}, which is given elsewhere too; give it once.", field=origin)
        self[name] = value


def _override(values: _Values, name: str, value: object) -> None:
    origin = f"override_settings.{shown(name)}"
    if not without_neutral({name: value}, _NEUTRAL_OVERRIDES, "override_settings."):
        return
    if name not in OVERRIDES and name not in GenerateRequest.model_fields:
        raise Unsupported(
            f"There is no setting {shown(name)!r} here but {', '.join(OVERRIDES)} and the fields of /api/generate.",
            field=origin,
        )
    if name == "samples_format" and value == "jpg":
        value = "jpeg"
    values.put(OVERRIDES.get(name, name), value, origin)


def _scripts(values: _Values, scripts: Mapping[str, Any]) -> None:
    for name, given in scripts.items():
        origin = f"alwayson_scripts.{shown(name)}"
        args = given.get("args", []) if isinstance(given, dict) else given
        if name.lower() == SCRIPT.lower():
            if not isinstance(args, list) or len(args) != 1 or not isinstance(args[0], dict):
                raise Invalid(f'{origin} must be {{"args": [{{…}}]}} with fields of /api/generate in it.', field=origin)
            for field, value in args[0].items():
                values.put(field, value, f"{origin}.{shown(field)}")
        elif args not in (None, [], [False]):
            raise Unsupported(
                f"There is no script {shown(name)!r} here. Leave it out; the fields of /api/generate, adetailer among "
                f"them, go into the script {SCRIPT}.",
                field=origin,
            )


def _sampler(values: _Values, options: Options) -> None:
    name = options.sampler_name or options.sampler_index
    sampler = None
    if name is None:
        scheduler = scheduler_alone(options.scheduler)
    else:
        sampler, scheduler = pair(name, options.scheduler)
        values.put("sampler", sampler.ours, "sampler_name")
    if scheduler is not None:
        values.put("scheduler", scheduler, "scheduler")
    if sampler is not None and sampler.eta is not None and options.eta not in (None, sampler.eta):
        raise Unsupported(
            f"{sampler.name} runs with eta {sampler.eta:g} here: another one would have no effect. Send that, or null.",
            field="eta",
        )


def _number(values: _Values, options: Options) -> None:
    size, count = options.batch_size or 1, options.n_iter or 1
    if size * count > 10:
        raise Invalid(f"n_iter × batch_size is {count} × {size}, and at most 10 pictures a request.", field="n_iter")
    values.put("num_images", size * count, "n_iter")
    values["batch_size"] = size


def _networks(values: _Values) -> None:
    """LoRAs are named in the prompt there: <lora:name:0.8>, or <lora:name:te:unet>, each of the two by name too."""
    loras = []
    for kind, words in _TAG.findall(values["prompt"]):
        name, *given = words.split(":")
        named = dict(word.partition("=")[::2] for word in given if "=" in word)
        plain = [word for word in given if "=" not in word]
        try:
            if kind == "hypernet" or len(plain) > 2 or named.keys() - {"te", "unet"}:
                raise ValueError
            text = float(named.get("te", plain[0] if plain else 1.0))
            unet = float(named.get("unet", plain[1] if len(plain) > 1 else text))
        except ValueError:
            raise Invalid(
                f"The prompt's {shown(f'<{kind}:{words}>')} is not <lora:name>, <lora:name:0.8> or "
                "<lora:name:te=0.5:unet=0.8>.",
                field="prompt",
            ) from None
        loras.append({"name": name, "weight": unet} | ({} if text == unet else {"text_weight": text}))
    if loras:
        values.put("loras", loras, "prompt")
        values["prompt"] = _TAG.sub("", values["prompt"])


def payload_schema(kind: type[Options]) -> dict[str, Any]:
    """JSON Schema of the body, for OpenAPI."""
    ours = request_schema()
    ours.pop("$defs", None)
    theirs = kind.model_json_schema()
    properties = {
        **{name: _nullable(schema) for name, schema in ours["properties"].items()},
        **{name: field.schema() for name, field in kind.neutral.items()},
        **{name: {"description": "Changes nothing by itself."} for name in sorted(kind.idle | HIRES.keys())},
        **theirs["properties"],
    }
    required = ["prompt", *theirs.get("required", [])]
    return {**ours, "title": kind.title, "required": required, "properties": properties, "examples": []}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    words = {name: value for name, value in schema.items() if name in ("title", "description")}
    rest = {name: value for name, value in schema.items() if name not in words}
    return {**words, "anyOf": [rest, {"type": "null"}]}
