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


_NOT_SAVED = "Pictures are in the answer and kept nowhere."
_SAMPLER_NOISE = "Samplers here have no such setting."
# Read by AUTOMATIC1111 only beside something that is refused here, or by models of another kind: whatever its value, it
# changes nothing there either.
_IDLE = Foreign(None, "It is read beside what there is not here.")
TXT2IMG = {
    "styles": Foreign(([], [""]), "Write the style into the prompt."),
    "subseed_strength": Foreign((0,), "Seeds are not mixed here."),
    "seed_resize_from_h": Foreign((0, -1), "Seeds are not resized here."),
    "seed_resize_from_w": Foreign((0, -1), "Seeds are not resized here."),
    "restore_faces": Foreign((False,), "Set adetailer, a field of ours, instead."),
    "tiling": Foreign((False,), "Pictures that tile are not drawn here."),
    "do_not_save_samples": Foreign((False, True), _NOT_SAVED),
    "do_not_save_grid": Foreign((False, True), _NOT_SAVED),
    "save_images": Foreign((False,), _NOT_SAVED, ignored=(True,)),
    "send_images": Foreign((True,), _NOT_SAVED, ignored=(False,)),
    "s_churn": Foreign((0,), _SAMPLER_NOISE),
    "s_tmin": Foreign((0,), _SAMPLER_NOISE),
    "s_tmax": Foreign((0,), _SAMPLER_NOISE),
    "s_noise": Foreign((1,), _SAMPLER_NOISE),
    "s_min_uncond": Foreign((0,), "Set guidance_end, a field of ours, instead."),
    "script_name": Foreign(("", "None"), "There are no scripts here but WaveSpeed, in alwayson_scripts."),
    "script_args": Foreign(([],), "There are no scripts here but WaveSpeed, in alwayson_scripts."),
    "disable_extra_networks": Foreign((False,), "Leave the LoRAs out of the prompt."),
    "comments": Foreign(({},), "Leave it out."),
    "infotext": Foreign(("",), "Send the settings as fields."),
    "firstpass_image": Foreign((), "Use img2img."),
    "firstphase_width": Foreign((0,), "Set enable_hr and hr_scale 2."),
    "firstphase_height": Foreign((0,), "Set enable_hr and hr_scale 2."),
    "override_settings_restore_afterwards": Foreign(
        (True,), "override_settings belong to their request; POST options chooses a model.", ignored=(False,)
    ),
    **dict.fromkeys(("url", "auth"), Foreign(None, "They are the client's own.")),
    **dict.fromkeys(("subseed", "hr_cfg"), _IDLE),
}
IMG2IMG = TXT2IMG | {
    "latent_mask": Foreign((), "Send it as mask."),
    "initial_noise_multiplier": Foreign((1,), "Set denoising_strength."),
    "include_init_images": Foreign((False,), "The picture is with you already."),
    "enable_hr": Foreign((False,), "Set hires_fix, a field of ours, instead."),
    **dict.fromkeys(("mask_round", "image_cfg_scale"), _IDLE),
}
MASKED = IMG2IMG | {"inpainting_mask_invert": Foreign((0,), "Send the mask inverted: what is white is drawn.")}
"""Of an img2img with a mask, whose other fields are read in app/http/apis/a1111_payload.py."""
_OF_MASK = (
    *("inpaint_full_res", "inpaint_full_res_padding", "inpainting_fill", "inpainting_mask_invert"),
    *("mask_blur", "mask_blur_x", "mask_blur_y"),
)
IMG2IMG |= dict.fromkeys(_OF_MASK, _IDLE)
_HIRES = "hires_fix here enlarges with Lanczos or an upscaler to twice the size and draws over it at half strength."
HIRES = {
    "hr_scale": Foreign((2,), _HIRES),
    "hr_upscaler": Foreign(("Lanczos",), _HIRES),
    "denoising_strength": Foreign((0.5,), _HIRES),
    "hr_second_pass_steps": Foreign((0,), _HIRES),
    "hr_resize_x": Foreign((0,), _HIRES),
    "hr_resize_y": Foreign((0,), _HIRES),
    "hr_checkpoint_name": Foreign(("", "Use same checkpoint"), _HIRES),
    "hr_sampler_name": Foreign(("", "Use same sampler"), _HIRES),
    "hr_scheduler": Foreign(("", "Use same scheduler"), _HIRES),
    "hr_prompt": Foreign(("",), _HIRES),
    "hr_negative_prompt": Foreign(("",), _HIRES),
    "hr_additional_modules": Foreign(([], ["Use same choices"]), _HIRES),
}
_OWN_VAE = "A model is used with the VAE that it comes with."
SETTINGS = {
    "sd_model_checkpoint": Foreign(("",), ours="model"),
    "CLIP_stop_at_last_layers": Foreign(ours="clip_skip"),
    "samples_format": Foreign(ours="output_format"),
    "live_previews_enable": Foreign(ours="enable_preview"),
    "skip_early_cond": Foreign(ours="guidance_start"),
    "sd_vae": Foreign(("Automatic", "None", ""), _OWN_VAE),
    "forge_additional_modules": Foreign(([],), _OWN_VAE),
    "img2img_color_correction": Foreign((False,), "Colours are left as they are drawn."),
    "eta_noise_seed_delta": Foreign((0,), "Give another seed."),
}
"""Of AUTOMATIC1111's override_settings."""


PREPROCESSORS = {"none": False, "canny": True}
"""What is made of a ControlNet's picture before it is shown, by AUTOMATIC1111's names: `edges` of ours."""
SEND_THE_MAP = "Make the map yourself, and send it as it is (none)."
_OWN_CANNY = "Edges are found at the drawing's size, by thresholds 100 and 200; send the map for others."
_WHOLE_PICTURE = "A ControlNet sees the whole picture."
_NO_BATCH = "Each ControlNet reads one picture."
UNIT = {
    **dict.fromkeys(("lowvram", "low_vram"), Foreign((False,), "Memory is planned as a whole.", ignored=(True,))),
    "processor_res": Foreign(None, _OWN_CANNY),
    "pixel_perfect": Foreign((False, True), _OWN_CANNY),
    "threshold_a": Foreign((-1, 100), _OWN_CANNY),
    "threshold_b": Foreign((-1, 200), _OWN_CANNY),
    "control_mode": Foreign((0, "Balanced"), "Set weight, guidance_start and guidance_end: both sides get the same."),
    "guessmode": Foreign((False,), "Set weight, guidance_start and guidance_end."),
    "hr_option": Foreign((0, "Both", "HiResFixOption.BOTH"), "It acts in both passes."),
    "save_detected_map": Foreign((True, False), "Maps are not sent back."),
    "inpaint_crop_input_image": Foreign((True, False), "A close-up has the part of it that lies under it."),
    "advanced_weighting": Foreign((), "Set weight."),
    "soft_injection": Foreign((False,), "Set weight."),
    "mask": Foreign(("",), _WHOLE_PICTURE),
    "mask_image": Foreign(("",), _WHOLE_PICTURE),
    "effective_region_mask": Foreign(("",), _WHOLE_PICTURE),
    "ipadapter_input": Foreign(([],), "IP-Adapters are not drawn with."),
    "union_control_type": Foreign(("Unknown",), "ControlNets of one kind alone are drawn with."),
    "loopback": Foreign((False,), _NO_BATCH),
    "input_mode": Foreign(("simple",), _NO_BATCH),
    "batch_images": Foreign(("", []), _NO_BATCH),
    **dict.fromkeys(("batch_input_gallery", "batch_mask_gallery", "batch_image_files"), Foreign(([],), _NO_BATCH)),
    **dict.fromkeys(
        ("pulid_mode", "is_ui", "output_dir", "generated_image", "use_preview_as_input", "batch_modifiers", "id"), _IDLE
    ),
}
"""Of AUTOMATIC1111's ControlNet, of one unit: internal_controlnet/args.py of sd-webui-controlnet 1.1.455."""


class CfgFree(BaseModel):
    """LightDiffusion's words for `guidance_end`: guidance fades out from there on; here it ends."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    cfg_free_enabled: bool = Field(False, description="Whether cfg_free_start_percent is read.")
    cfg_free_start_percent: float = Field(70.0, ge=0, le=100, description="guidance_end, in percent.")


class ControlNet(BaseModel):
    """LightDiffusion's words for one of `control`, which reads img2img_image."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    controlnet_enabled: bool = Field(False, description="Whether the other three are read.")
    controlnet_model: str | None = Field(None, description="model of one of control.")
    controlnet_strength: float = Field(1.0, ge=0, le=2, description="weight of it.")
    controlnet_type: str = Field(
        "canny",
        max_length=200,
        description="canny: edges of it, found in img2img_image; none: img2img_image is the map.",
    )

    def put_into(self, body: dict[str, Any]) -> None:
        """As `control`. Without img2img the picture is the ControlNet's alone. Raises Invalid, Unsupported."""
        if not self.controlnet_enabled:
            return
        if "control" in body:
            raise Invalid("controlnet_enabled says control already; give one.", field="controlnet_enabled")
        if not self.controlnet_model:
            raise Invalid("Name a ControlNet: GET /api/controlnets lists them.", field="controlnet_model")
        if body.get("img2img_image") is None:
            raise Invalid("A ControlNet reads a picture: send it in img2img_image.", field="img2img_image")
        if self.controlnet_type not in PREPROCESSORS:
            raise Unsupported(
                f"controlnet_type can only be {' or '.join(PREPROCESSORS)}. {SEND_THE_MAP}", field="controlnet_type"
            )
        image = body["img2img_image"] if body.get("img2img_enabled") is True else body.pop("img2img_image")
        shown, edges = {"model": self.controlnet_model, "image": image}, PREPROCESSORS[self.controlnet_type]
        body["control"] = [{**shown, "weight": self.controlnet_strength, "edges": edges}]
