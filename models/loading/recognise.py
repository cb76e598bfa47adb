"""What a weights file holds, by the names and shapes of its tensors: its networks, its family, what it predicts.

The names are those of the first publications (CompVis, Stability AI, Black Forest Labs) and of what ComfyUI saves.
A file's own name says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

from models.base import Distilled, Prediction

from .header import BadFile, Header, TensorInfo, read_header
from .quantised import COMPANIONS, LEFT_BEHIND

Role = Literal["unet", "flux", "vae4", "vae16", "clip_l", "clip_h", "clip_g", "t5"]
"""What a network can be to a family: autoencoders by their latents' channels, text encoders by their layers."""

PARTS: Mapping[str, Mapping[str, Role]] = MappingProxyType(
    {
        "sd15": {"unet": "unet", "text_encoder": "clip_l", "vae": "vae4"},
        "sd21": {"unet": "unet", "text_encoder": "clip_h", "vae": "vae4"},
        "sdxl": {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g", "vae": "vae4"},
        "sdxl-refiner": {"unet": "unet", "text_encoder_2": "clip_g", "vae": "vae4"},
        "flux-schnell": {"transformer": "flux", "text_encoder": "clip_l", "text_encoder_2": "t5", "vae": "vae16"},
        "flux-dev": {"transformer": "flux", "text_encoder": "clip_l", "text_encoder_2": "t5", "vae": "vae16"},
        "flux-fill": {"transformer": "flux", "text_encoder": "clip_l", "text_encoder_2": "t5", "vae": "vae16"},
    }
)
"""Family → component of its pipeline → the network that it is."""
WORDS: Mapping[Role, str] = MappingProxyType(
    {
        "unet": "a UNet",
        "flux": "a Flux transformer",
        "vae4": "an autoencoder of Stable Diffusion",
        "vae16": "an autoencoder of 16 channels (Flux's)",
        "clip_l": "a text encoder CLIP-L",
        "clip_h": "a text encoder OpenCLIP-H (SD2's)",
        "clip_g": "a text encoder OpenCLIP-G (SDXL's second)",
        "t5": "a text encoder T5-XXL",
    }
)
_PREFIXES: tuple[tuple[str, Role | None], ...] = (
    ("model.diffusion_model.", None),
    ("diffusion_model.", None),
    ("first_stage_model.", None),
    ("vae.", None),
    ("cond_stage_model.transformer.", "clip_l"),
    ("cond_stage_model.model.", "clip_h"),
    ("conditioner.embedders.0.transformer.", "clip_l"),
    ("conditioner.embedders.0.model.", "clip_g"),  # the refiner's
    ("conditioner.embedders.1.model.", "clip_g"),
    ("text_encoders.clip_l.transformer.", "clip_l"),
    ("text_encoders.clip_g.transformer.", "clip_g"),
    ("text_encoders.t5xxl.transformer.", "t5"),
)
"""Where a file of several networks keeps each, and what that says of it."""
_LAYERS: Mapping[int, Role] = {12: "clip_l", 23: "clip_h", 24: "clip_h", 32: "clip_g"}
_TRAINING = re.compile(  # of what a training run left behind, or a writer's notes: nothing that a network is made of
    r"model_ema\..*|(?:alphas|betas|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar|denoiser\.sigmas|loss\.).*"
    r"|(?:.*\.)?scaled_fp8|global_step|epoch|pytorch-lightning_version|v_pred|ztsnr|spiece_model"
    r"|.*(?:position_ids|logit_scale)|first_stage_model\.loss\..*|text_encoders\.\w+\.text_projection"
    r"|vision_model\..*|visual_projection\.weight|visual\..*"  # CLIP's other half, which sees
)
_FURTHER = {  # what a UNet of more channels than 4 is
    5: "a Stable Diffusion 2 with depth",
    7: "Stable Diffusion's upscaler",
    8: "a model that draws from a picture, as InstructPix2Pix",
}
_SAYS = ("modelspec.architecture", "modelspec.title", "modelspec.tags")
"""Metadata in which a file's writer tells its kind. Trainers' own, `ss_…`, hold names of files."""
_DISTILLED = re.compile(r"(turbo|lightning|lcm|hyper(?=[-_ ]?sd))(?:[-_ ]?sd(?:xl)?)?(?![a-z])", re.IGNORECASE)
_STEPS = re.compile(r"(?<!\d)([1-9]|1[0-6])[-_ ]?steps?(?![a-z])", re.IGNORECASE)
_EDM = {"edm_mean", "edm_vpred.sigma_max"}
_LEAVES = {"weight", "bias", "scale", "in_proj_weight", "in_proj_bias", "positional_embedding", "text_projection"}
_LEAVES |= COMPANIONS
_ADAPTER = re.compile(r"lora_|\.lora\.|_lora\d?\.|\.lora_[AB]|hada_w|lokr_w|oft_blocks|oft_diag|dora_scale|glora")
_READ_HERE = "Take a file in fp8, scaled fp8, 16 bit, or GGUF"
_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"  # in T5 the first block has it alone
_IN_ONE = "as one file, which is not served here: bring its diffusers folder"
_OTHER_FLUXES = ("distilled_guidance_layer.in_proj.weight", "single_stream_modulation.lin.weight")  # in Flux's names
_HEADS = (  # other kinds, by a part of a tensor's name
    (
        r"control_model\.|controlnet_|input_hint_block|controlnet_cond_embedding",
        "a ControlNet, which steers a model: put it into the folder of ControlNets",
    ),
    (r"^(emb_params|string_to_param|clip_[lg])$", "an embedding: put it into the folder of embeddings"),
    (r"^(vision_model|visual)\.", "CLIP's vision encoder, which is not served here"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter, which is not served here"),
    (r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\.", "a T2I-Adapter, which is not served here"),
    (r"joint_blocks\.", f"a Stable Diffusion 3 {_IN_ONE}"),
    (r"distilled_guidance_layer", f"a Chroma {_IN_ONE}"),
    (r"(^|\.)txt_norm\.weight$", f"a Qwen-Image {_IN_ONE}"),
    (r"single_stream_modulation", f"a FLUX.2 {_IN_ONE}"),
    (r"(noise|context)_refiner\.", f"a Z-Image or Lumina 2 {_IN_ONE}"),
    (r"motion_modules|temporal_transformer", "a motion module or a video model, which is not served here"),
    (r"^(down_blocks|up_blocks)\.\d", "a UNet in diffusers' names without its other networks: bring its whole folder"),
    (re.escape(_UMT5), "a text encoder UMT5, of a family that is not served here"),
    (r"^enc\.blk\.0\.", "a text encoder T5 in llama.cpp's names: take it as safetensors, in fp8, scaled fp8 or 16 bit"),
    (r"^(conv_first|model\.0|body\.0)\.", "an upscaler, which is no model by itself"),
)


@dataclass(frozen=True, slots=True)
class Network:
    """A network in a file. tensors: its own, by their names after `prefix`."""

    role: Role
    prefix: str
    tensors: Mapping[str, TensorInfo]

    @property
    def numbers(self) -> int:
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def ending(self, *ends: str) -> TensorInfo:
        """The first tensor whose name ends so. Raises KeyError."""
        for name, info in self.tensors.items():
            if name.endswith(ends):
                return info
        raise KeyError(ends[0])


@dataclass(frozen=True, slots=True)
class FewSteps:
    """What a distilled model is drawn with, where nobody says otherwise. guidance_scale: None: its family's."""

    kind: Distilled
    steps: int
    guidance_scale: float | None


@dataclass(frozen=True, slots=True)
class Recognised:
    """family: None where the file is no model that is served; `reason` then goes on after its name.

    networks: what is in it, by what they are. prediction: what the file says itself that it predicts; None where it
    does not say so. terminal_snr: its schedule ends in pure noise (Lin et al. 2024). few_steps: where its writer says
    that it is distilled.
    """

    family: str | None
    reason: str = ""
    networks: Mapping[Role, Network] = field(default_factory=dict)
    prediction: Prediction | None = None
    terminal_snr: bool | None = None
    few_steps: FewSteps | None = None


def recognise_file(file: Path) -> Recognised:
    """What the file is, which is remembered until it changes. Raises BadFile, OSError."""
    found = file.stat()
    return _recognise_file(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=16)
def _recognise_file(file: Path, changed: int, size: int) -> Recognised:
    return recognise(read_header(file))


def recognise(header: Header) -> Recognised:
    """What a file with this header is."""
    if not header:
        return Recognised(None, "holds no tensors")
    if any(key.endswith(".wscales") for key in header):  # it has LoRAs of its own, of what the rounding lost
        return Recognised(None, f"is in nunchaku's SVDQuant, a quantisation that is not supported. {_READ_HERE}")
    if any(_ADAPTER.search(key) for key in header):
        return Recognised(None, "is a LoRA: put it into the folder of LoRAs")
    networks, rest = _networks(header)
    denoiser = networks.get("unet") or networks.get("flux")
    if denoiser is None:
        if networks:
            words = " and ".join(WORDS[role] for role in networks)
            return Recognised(None, f"is {words}: a part that models here take, and no model by itself", networks)
        kinds = (what for mark, what in _HEADS if any(re.search(mark, key) for key in header))
        return Recognised(None, f"is {next(kinds, 'none of the kinds of files that are known here')}")
    prediction, terminal = _predicts(header) if denoiser.role == "unet" else (None, None)
    try:
        family = _unet_family(denoiser) if denoiser.role == "unet" else _flux_family(denoiser)
        if _EDM & header.keys():
            raise BadFile("was trained in EDM's parametrisation (its keys say so), which no sampler here has")
        if left := next((name for name in rest if LEFT_BEHIND.search(name.rpartition(".")[2])), None):
            raise BadFile(f"holds {left}, a part of a quantisation that is not supported. {_READ_HERE}")
        if rest:
            raise BadFile(f"holds {len(rest)} tensors that belong to no network known here, {rest[0][:80]!r} first")
    except BadFile as error:
        return Recognised(None, str(error), networks)
    except LookupError as error:
        return Recognised(None, f"lacks a tensor that every model of its kind has: {error}", networks)
    return Recognised(family, "", networks, prediction, terminal, _distilled(header, family))


def _networks(header: Header) -> tuple[dict[Role, Network], list[str]]:
    """Those that are in the file, and the names of tensors that belong to none."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    roles = dict(_PREFIXES)
    rest: list[str] = []
    for key, info in header.items():
        prefix = next((prefix for prefix in roles if key.startswith(prefix)), "")
        if not _TRAINING.fullmatch(key):
            groups.setdefault(prefix, {})[key.removeprefix(prefix)] = info
    found: dict[Role, Network] = {}
    for prefix, tensors in groups.items():
        role = _role(tensors, roles.get(prefix))
        if role is None or role in found:
            rest += [prefix + key for key in tensors]
            continue
        found[role] = Network(role, prefix, tensors)
        rest += [prefix + key for key in tensors if key.rpartition(".")[2] not in _LEAVES]
    return found, rest


def _role(tensors: Mapping[str, TensorInfo], said: Role | None) -> Role | None:
    """What these tensors are; said: what their prefix says of text encoders. None for a part of a network, too."""

    def has(*names: str) -> bool:
        return all(name in tensors for name in names)

    latents = tensors.get("decoder.conv_in.weight")
    if has("input_blocks.0.0.weight"):
        return "unet"
    if any(name in tensors for name in _OTHER_FLUXES):
        return None
    if has("double_blocks.0.img_attn.qkv.weight", "img_in.weight", "final_layer.linear.weight"):
        return "flux"
    if has("transformer_blocks.0.attn.add_k_proj.weight", "x_embedder.weight", "proj_out.weight"):
        return "flux"
    if latents is not None and len(latents.shape) == 4:
        return {4: "vae4", 16: "vae16"}.get(latents.shape[1])  # type: ignore[return-value]
    if has("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"):
        return None if has(_UMT5) else "t5"
    ends = tuple(
        name
        for name in tensors
        if name.endswith(("token_embedding.weight", "final_layer_norm.weight", "ln_final.weight"))
    )
    if len(ends) == 2:
        return said or _LAYERS.get(layers(tensors, r"(?:encoder\.layers|resblocks)\.(\d+)\."))
    return None


def layers(tensors: Iterable[str], pattern: str) -> int:
    """One more than the highest number that the group of `pattern` finds in a name."""
    return max((int(match[1]) + 1 for name in tensors if (match := re.search(pattern, name))), default=0)


def _unet_family(unet: Network) -> str:
    channels = unet.tensors["input_blocks.0.0.weight"].shape[1]
    labelled = "label_emb.0.0.weight" in unet.tensors
    deepest = layers(unet.tensors, r"^input_blocks\.(\d+)\.")
    linear = len(unet.ending("proj_in.weight").shape) == 2
    family = ("sdxl-refiner" if deepest == 12 else "sdxl") if labelled else "sd21" if linear else "sd15"
    if any(".time_stack." in name or "motion_modules." in name for name in unet.tensors):
        raise BadFile("is a video model, which is not served here")
    if channels in _FURTHER:
        raise BadFile(f"is {_FURTHER[channels]} (its UNet takes {channels} channels), which is not served here")
    if labelled and "input_blocks.1.1.proj_in.weight" in unet.tensors:  # SDXL's first level does not attend
        raise BadFile("is an unCLIP of Stable Diffusion 2 (its UNet takes a picture's embedding), not served here")
    if channels not in (4, 9):  # 9: with a mask and the masked picture's latents, for inpainting
        raise BadFile(f"has a UNet of {channels} channels, and those served here take 4, or 9 to inpaint")
    if "time_embed.cond_proj.weight" in unet.tensors:
        raise BadFile("is a latent consistency model as one file, which is not served here: bring its diffusers folder")
    return family


def _flux_family(flux: Network) -> str:
    channels = flux.ending("img_in.weight", "x_embedder.weight").shape[-1]
    if channels == 384:
        return "flux-fill"
    if channels in (128, 448):
        raise BadFile(f"is a Flux for depth or edges (it takes {channels} numbers a token), not served here")
    distilled = any(name.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for name in flux.tensors)
    return "flux-dev" if distilled else "flux-schnell"


def _predicts(header: Header) -> tuple[Prediction | None, bool | None]:
    """By the keys that trainers and mergers put in, else by the metadata of Stability AI's model specification."""
    if "v_pred" in header:
        return "v_prediction", "ztsnr" in header
    said = header.metadata.get("modelspec.prediction_type", "").lower()
    terminal = True if "ztsnr" in header else None
    return ("v_prediction" if said in ("v", "v_prediction") else "epsilon" if said else None), terminal


def few_steps(kind: Distilled, family: str, steps: int | None = None) -> FewSteps:
    """What a model of this kind is drawn with. Flux dev takes its guidance as a number even then."""
    flux = family.startswith("flux")
    return FewSteps(kind, steps or (8 if flux else 4), None if flux else 1.0)


def _distilled(header: Header, family: str) -> FewSteps | None:
    said = " ".join(header.metadata.get(key, "") for key in _SAYS)
    found, steps = _DISTILLED.search(said), _STEPS.search(said)
    if found is None or family == "flux-schnell":
        return None
    return few_steps(cast(Distilled, found[1].lower()), family, int(steps[1]) if steps else None)
