"""AUTOMATIC1111's payload → our request. What would change the picture and is not here is refused, the rest is taken.

Its fields: modules/processing.py and modules/api/models.py of its version 1.10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from app.errors import Invalid, Unsupported, shown
from app.http.foreign import (
    HIRES,
    IMG2IMG,
    MASKED,
    PREPROCESSORS,
    SEND_THE_MAP,
    SETTINGS,
    TXT2IMG,
    UNIT,
    same,
    translated,
    whole_numbers,
)
from app.http.pictures import Reading
from app.http.render import request_schema
from app.http.schemas import KNOWN, LONGEST_NAME, GenerateRequest, parse, validated
from app.infotext import pair, scheduler_alone

SCRIPT = "WaveSpeed"
"""Under this name `alwayson_scripts` takes our own fields: {"WaveSpeed": {"args": [{"deepcache_enabled": true}]}}."""
_HIRES_DEFAULTS = {"hr_scale": 2.0, "hr_upscaler": "Latent", "denoising_strength": 0.75}
OVERRIDES = [name for name, field in SETTINGS.items() if field.ours]
CUT = (1, "Crop and Resize", "Inner Fit (Scale to Fit)", "Scale to Fit (Inner Fit)")
UNCUT = (0, 2, "Just Resize", "Resize and Fill", "Outer Fit (Shrink to Fit)", "Envelope (Outer Fit)")
"""How a unit brings its picture to the drawing's aspect: by cutting it, as here, or otherwise."""
OF_UNIT = {"model": "model", "weight": "weight", "guidance_start": "start", "guidance_end": "end"}
_HASH = re.compile(r"\s*\[[0-9a-f]{6,10}\]$")  # that it shows behind a model's name
_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>")
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Word = Annotated[str, Field(max_length=LONGEST_NAME)]


class Options(BaseModel):
    """What AUTOMATIC1111 names otherwise than we do, in both endpoints; `foreign` are its other fields."""

    model_config = ConfigDict(strict=True, extra="forbid")
    title: ClassVar = "Txt2ImgRequest"
    foreign: ClassVar = TXT2IMG

    sampler_name: _Word | None = Field(
        None, description="As GET /sdapi/v1/samplers lists them; null or empty: the model's own."
    )
    sampler_index: _Word | None = Field(None, description="Read where sampler_name is null or empty.")
    scheduler: _Word | None = Field(None, description="As GET /sdapi/v1/schedulers lists them.")
    batch_size: int | None = Field(None, ge=1, le=10, description="Pictures denoised together.")
    n_iter: int | None = Field(None, ge=1, le=10, description="Batches; n_iter × batch_size is at most 10.")
    eta: _Share | None = Field(
        None,
        description="Only what the sampler does anyway: 1 if ancestral or SDE; 0 and null leave it to it.",
    )
    denoising_strength: _Share | None = Field(None, description="Read by img2img, and with enable_hr.")
    enable_hr: bool | None = Field(None, description="hires_fix; width and height are those before it.")
    override_settings: dict[str, Any] | None = Field(
        None, description=f"{', '.join(OVERRIDES)}, and any field of POST /api/generate."
    )
    alwayson_scripts: dict[str, Any] | None = Field(
        None,
        description=f"{SCRIPT}: {{args: [{{…}}]}} with any field of POST /api/generate; ControlNet, whose units are "
        "control; ADetailer with a model for faces; others only switched off.",
    )
    refiner_checkpoint: _Word | None = Field(None, description="refiner_model; empty or None: none.")
    refiner_switch_at: float | None = Field(
        None, description="refiner_switch. Read where refiner_checkpoint names a model."
    )
    force_task_id: _Word | None = Field(None, description="Taken and not read.")


class Img2ImgOptions(Options):
    """And those of img2img alone."""

    title: ClassVar = "Img2ImgRequest"
    foreign: ClassVar = IMG2IMG
    init_images: Annotated[list[str], Field(min_length=1, max_length=1)] = Field(
        description="One picture, base64 or a data URL. Never a path or a URL."
    )
    resize_mode: int | None = Field(
        None, ge=0, le=2, description="1 crops to the aspect; 0 and 2 only for a picture that has it already."
    )


def read_payload(
    body: dict[str, Any], kind: type[Options], model: str | None = None
) -> tuple[GenerateRequest, Reading]:
    """The request, and how its pictures are read.

    model: of a request that names none. Raises Invalid, Unsupported or Incompatible.
    """
    masked = kind is Img2ImgOptions and body.get("mask") is not None
    body, said = translated(whole_numbers(body), MASKED if masked else kind.foreign)
    named = body.get("hr_upscaler")
    file = named if isinstance(named, str) and named != "Lanczos" and not named.startswith("Latent") else None
    if body.get("enable_hr") is True:
        translated({**_HIRES_DEFAULTS, **body, **({"hr_upscaler": "Lanczos"} if file else {})}, HIRES)
    body = {name: value for name, value in body.items() if name not in HIRES or name == "denoising_strength"}
    options = validated(kind, {name: body.pop(name) for name in kind.model_fields if name in body})
    values = _Values(body)
    said += _override(values, options.override_settings or {})
    said += _scripts(values, options)
    _sampler(values, options)
    _number(values, options)
    if options.enable_hr:
        values.put("hires_fix", True, "enable_hr")
        if file:
            values.put("hires_upscaler", file, "hr_upscaler")
        for name in ("width", "height"):
            pixels = values.get(name, GenerateRequest.model_fields[name].default)
            values[name] = pixels * 2 if isinstance(pixels, int) else pixels
    if options.refiner_checkpoint not in (None, "", "None"):
        values.put("refiner_model", options.refiner_checkpoint, "refiner_checkpoint")
        if options.refiner_switch_at is not None:
            values.put("refiner_switch", options.refiner_switch_at, "refiner_switch_at")
    if isinstance(options, Img2ImgOptions):
        denoise = 0.75 if options.denoising_strength is None else options.denoising_strength
        values.put("img2img_enabled", True, "init_images")
        values.put("img2img_image", options.init_images[0], "init_images")
        values.put("img2img_denoise", denoise, "denoising_strength")
    if masked:
        _mask(values)
    if isinstance(values.get("prompt"), str):
        _networks(values)
    if model is not None and not values.keys() & {"model", "model_path", "flux_enabled"}:
        values["model"] = model
    fields = parse(values, (*KNOWN, *kind.model_fields, *kind.foreign), said)
    # Only mode 1 cuts the picture there as it is cut here.
    if isinstance(options, Img2ImgOptions) and options.resize_mode != 1:
        values.uncut.add("img2img_image")
    return fields, Reading(uncut=frozenset(values.uncut))


class _Values(dict[str, Any]):
    """Our fields, from wherever in the payload they come. uncut: as of Reading."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.uncut: set[str] = set()
        # null is AUTOMATIC1111's word for "the default", also where ours knows none.
        super().__init__({name: value for name, value in body.items() if value is not None})

    def put(self, name: str, value: object, origin: str) -> None:
        """The same value once more is no contradiction: some clients say a thing by two names."""
        if name in self and not same(self[name], value):
            raise Invalid(f"{origin} says {name}, which is given elsewhere too; give it once.", field=origin)
        self[name] = value


def _override(values: _Values, settings: Mapping[str, Any]) -> list[str]:
    """A sentence on each that is left out."""
    where, said = "override_settings.", []
    for name, given in whole_numbers(settings).items():
        rest, left_out = translated({name: given}, SETTINGS, where)
        said += left_out
        for ours, value in rest.items():
            if ours not in GenerateRequest.model_fields:
                raise Unsupported(
                    f"There is no setting {shown(name)!r} here but {', '.join(OVERRIDES)} and the fields of "
                    "/api/generate.",
                    field=f"{where}{shown(name)}",
                )
            values.put(ours, "jpeg" if (name, value) == ("samples_format", "jpg") else value, f"{where}{shown(name)}")
    return said


def _scripts(values: _Values, options: Options) -> list[str]:
    """A sentence on each whose settings are left out."""
    said = []
    for name, given in (options.alwayson_scripts or {}).items():
        origin = f"alwayson_scripts.{shown(name)}"
        args = given.get("args", []) if isinstance(given, dict) else given
        if name.lower() == SCRIPT.lower():
            if not isinstance(args, list) or len(args) != 1 or not isinstance(args[0], dict):
                raise Invalid(f'{origin} must be {{"args": [{{…}}]}} with fields of /api/generate in it.', field=origin)
            for field, value in whole_numbers(args[0]).items():
                values.put(field, value, f"{origin}.{shown(field)}")
        elif _is_off(args):
            continue
        elif name.lower() == "controlnet" and isinstance(args, list):
            said += _units(values, options, args, origin)
        elif name.lower() == "adetailer" and _finds_faces(args, img2img=isinstance(options, Img2ImgOptions)):
            values.put("adetailer", True, origin)
            said.append(f"{origin}: faces are found by this server's own detector.")
        else:
            raise Unsupported(
                f"There is no script {shown(name)!r} here. Leave it out, or its units disabled; the fields of "
                f"/api/generate, adetailer among them, go into the script {SCRIPT}.",
                field=origin,
            )
    return said


def _is_off(args: Any) -> bool:
    """Does the script do nothing? A script's switch is its first argument, or a key of each of its units."""
    if not isinstance(args, list) or not args:
        return args in (None, [])
    units = [unit for unit in args if not isinstance(unit, bool)]
    return args[0] is False or (bool(units) and all(map(_is_idle, units)))


def _is_idle(unit: Any) -> bool:
    """Of ControlNet and of ADetailer."""
    return isinstance(unit, dict) and (
        unit.get("enabled") is False or unit.get("ad_tab_enable") is False or unit.get("ad_model") == "None"
    )


def _finds_faces(args: list[Any], *, img2img: bool) -> bool:
    """Is ADetailer asked for what ours does: a model for faces, no setting beside it? Its 2nd switch skips img2img."""
    switches, units = [x for x in args if isinstance(x, bool)], [x for x in args if not isinstance(x, bool)]
    if len(switches) > 1 and switches[1] and img2img:
        return False
    match [unit for unit in units if not _is_idle(unit)]:
        case [{"ad_model": str(model), **rest}]:
            return model.startswith("face_") and not any(rest[key] for key in rest.keys() - {"ad_tab_enable"})
    return False


def _units(values: _Values, options: Options, args: list[Any], origin: str) -> list[str]:
    """ControlNet's units that are on, as control. A sentence on each of their fields that is left out."""
    control: list[dict[str, Any]] = []
    said: list[str] = []
    for place, unit in enumerate(args):
        where = f"{origin}.args.{place}"
        if isinstance(unit, bool) or _is_idle(unit):
            continue
        if not isinstance(unit, dict):
            raise Invalid(f"{where} is a unit: an object with module, model, image, weight and others.", field=where)
        module = unit.get("module") or "none"
        edges = PREPROCESSORS.get(module.lower()) if isinstance(module, str) else None
        if edges is None:
            raise Unsupported(
                f"There is no preprocessor {shown(str(module))!r} here but {', '.join(PREPROCESSORS)}. {SEND_THE_MAP}",
                field=f"{where}.module",
            )
        unread = ("module",) if edges else ("module", "threshold_a", "threshold_b")
        read = {name: value for name, value in unit.items() if name not in unread}
        rest, left_out = translated(whole_numbers(read), UNIT, f"{where}.")
        said += left_out
        image, mode = _picture_of(rest, where), rest.pop("resize_mode", None)
        if image is None and isinstance(options, Img2ImgOptions):
            image = options.init_images[0]
        if not any(same(mode, one) for one in (None, *CUT, *UNCUT)):
            known = ", ".join(map(str, CUT + UNCUT))
            raise Invalid(f"{where}.resize_mode is one of {known}.", field=f"{where}.resize_mode")
        if mode in UNCUT:
            values.uncut.add(f"control.{len(control)}.image")
        ours = {name: rest.pop(theirs) for theirs, name in OF_UNIT.items() if rest.get(theirs) is not None}
        if isinstance(ours.get("model"), str):
            ours["model"] = _HASH.sub("", ours["model"])
        for name, value in rest.items():
            if name not in ("enabled", *OF_UNIT) and value is not None:
                message = f"A unit of ControlNet has no {shown(name)!r} here; leave it out."
                raise Unsupported(message, field=f"{where}.{shown(name)}")
        control.append({**ours, "edges": edges, **({} if image is None else {"image": image})})
    values.put("control", control, origin)
    return said


def _picture_of(unit: dict[str, Any], where: str) -> Any:
    """A unit's picture, which is taken out of it: text, or an object with a mask beside it."""
    image, older = unit.pop("image", None), unit.pop("input_image", None)
    image = older if image in (None, "") else image
    if isinstance(image, dict):
        if image.get("mask"):
            raise Unsupported("A ControlNet sees the whole picture: leave the mask out.", field=f"{where}.image.mask")
        image = image.get("image")
    return None if image in (None, "") else image


def _mask(values: _Values) -> None:
    """What lies beside a mask, with AUTOMATIC1111's defaults; but `inpainting_fill` 0, its own, is not drawn here."""
    tables = (
        ("inpainting_fill", {1: "original", 2: "noise"}, "mask_fill", 1),
        ("inpaint_full_res", {1: "masked", 0: "whole"}, "inpaint_area", 1),
    )
    for name, known, ours, default in tables:
        given = values.pop(name, default)
        if type(given) not in (int, bool) or given not in known:
            wording = ", ".join(f"{value} ({word})" for value, word in known.items())
            raise Unsupported(f"{name} can only be {wording}.", field=name)
        values.put(ours, known[given], name)
    padding = values.pop("inpaint_full_res_padding", 0)
    if values["inpaint_area"] == "masked":
        values.put("inpaint_padding", padding, "inpaint_full_res_padding")
    for name in ("mask_blur_x", "mask_blur_y"):
        if name in values:
            values.put("mask_blur", values.pop(name), name)


def _sampler(values: _Values, options: Options) -> None:
    name = options.sampler_name or options.sampler_index
    sampler = None
    if not name:
        scheduler = scheduler_alone(options.scheduler)
    else:
        sampler, scheduler = pair(name, options.scheduler)
        values.put("sampler", sampler.ours, "sampler_name")
    if scheduler is not None:
        values.put("scheduler", scheduler, "scheduler")
    # AUTOMATIC1111 reads 0 as no value too.
    if sampler is not None and sampler.eta is not None and options.eta not in (None, 0, sampler.eta):
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
        **{
            name: field.schema(ours["properties"])
            for name, field in kind.foreign.items()
            if name not in ours["properties"]
        },
        **{name: {"description": "Changes nothing by itself."} for name in sorted(HIRES)},
        **theirs["properties"],
    }
    required = ["prompt", *theirs.get("required", [])]
    return {**ours, "title": kind.title, "required": required, "properties": properties, "examples": []}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    words = {name: value for name, value in schema.items() if name in ("title", "description")}
    rest = {name: value for name, value in schema.items() if name not in words}
    return {**words, "anyOf": [rest, {"type": "null"}]}
