"""LoRA (Hu et al. 2021): low-rank changes of the denoiser and the text encoders, in place for one request.

diffusers reads the files' layouts (kohya, diffusers, PEFT) and PEFT adds the layers; what they silently leave out is an
error here. The model's own weights are never written to: see docs/decisions/lora-layers.md.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from models.base import AdapterFailed, Lora
from models.finite import is_finite
from models.libraries import first_line

if TYPE_CHECKING:
    from torch import Tensor

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_DOWN = ("lora_down.weight", "lora.down.weight", "lora_A.weight", "lora_linear_layer.down.weight")
_SPELLING = re.compile(r"\.(?:(to_[qkv]|to_out)_lora|lora_linear_layer)\.(down|up)\b")
_NAMES = {"to_q": ".q_proj", "to_k": ".k_proj", "to_v": ".v_proj", "to_out": ".out_proj", None: ""}
_SIDES = {"down": ".lora_A", "up": ".lora_B"}
_OTHER_KINDS = {"dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA", "lokr_": "a LoKr", "hada_": "a LoHa"}


class LoraFailed(AdapterFailed):
    field = "loras"


@contextmanager
def applied(pipeline: Any, loras: Sequence[Lora]) -> Iterator[None]:
    """`pipeline` with the layers of `loras` beside its own, each by its weight; as it was afterwards.

    A weight of 0 adds nothing. Raises AdapterFailed for a file that is broken or was made for another model.
    """
    chosen = {f"lora{index}": lora for index, lora in enumerate(loras) if lora.weight != 0}
    if not chosen:
        yield
        return
    try:
        for adapter, lora in chosen.items():
            _load(pipeline, adapter, lora)
        _weigh(pipeline, {adapter: lora.weight for adapter, lora in chosen.items()})
        yield
    finally:
        pipeline.unload_lora_weights()
        for name in COMPONENTS:
            for attribute in ("peft_config", "_hf_peft_config_loaded"):
                getattr(getattr(pipeline, name, None), "__dict__", {}).pop(attribute, None)


def _load(pipeline: Any, adapter: str, lora: Lora) -> None:
    tensors, described = _read(lora)
    pairs = sum(key.endswith(_DOWN) for key in tensors)
    if pairs == 0:
        raise _failed(lora, "it holds no low-rank matrices.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of modules not found is counted below
            if described:  # by PEFT, in the file's header, which diffusers reads from the file itself
                options: dict[str, Any] = {"weight_name": lora.path.name, "local_files_only": True}
                _check_widths(pipeline, lora, tensors)
                pipeline.load_lora_weights(str(lora.path.parent), adapter_name=adapter, use_safetensors=True, **options)
            else:
                shape = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
                converted = pipeline.lora_state_dict(_scaled(_prefixed(pipeline, tensors)), **shape)
                named = _named(converted[0] if isinstance(converted, tuple) else converted)
                _check_widths(pipeline, lora, named)
                pipeline.load_lora_weights(named, adapter_name=adapter)
    except (MemoryError, AdapterFailed):
        raise
    except Exception as error:  # diffusers and PEFT raise whatever a shape or a name that is not theirs leads to
        raise _failed(lora, first_line(error)) from error
    placed = sum(1 for _ in _layers(pipeline, adapter))
    if placed < pairs:
        raise _failed(lora, f"{pairs - placed} of its {pairs} matrices belong to no layer of this model.")


def _check_widths(pipeline: Any, lora: Lora, converted: Mapping[str, Tensor]) -> None:
    """Refuse matrices that do not fit: to some, diffusers would fit Flux's transformer instead, and leave it so."""
    for key, tensor in converted.items():
        component, _, rest = key.partition(".")
        path, mark, _ = rest.partition(".lora_A.")
        model = getattr(pipeline, component, None)
        if not mark or model is None:
            continue
        try:
            width = model.get_submodule(path).weight.shape[1]
        except AttributeError:
            continue  # counted once it is loaded
        if tensor.shape[1] != width:
            raise _failed(
                lora, f"its matrix for {key.removesuffix('.weight')} has {tensor.shape[1]} columns, not {width}."
            )


def _read(lora: Lora) -> tuple[dict[str, Tensor], bool]:
    """The file's tensors, and whether its header describes them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(lora.path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
            described = "lora_adapter_metadata" in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise _failed(lora, f"its file cannot be read: {first_line(error)}") from error
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in key for key in tensors):
            raise _failed(lora, f"it is {kind}, which is not supported.")
    for key in tensors:
        if "lora" not in key and not key.endswith(".alpha"):
            raise _failed(lora, f"it holds {key[:80]!r}, which is no low-rank matrix.")
    if (broken := next((key for key, tensor in tensors.items() if not is_finite([tensor])), None)) is not None:
        raise _failed(lora, f"its {broken[:80]!r} holds numbers that are not finite.")
    return tensors, described


def _prefixed(pipeline: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT saved of a bare denoiser, under the denoiser's name in the pipeline."""
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    bare = "base_model.model."
    return {f"{denoiser}.{k.removeprefix(bare)}" if k.startswith(bare) else k: v for k, v in tensors.items()}


def _scaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kohya's alphas multiplied into the up matrices, as alpha / rank: diffusers loses some where they differ."""
    scaled = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    for key in tensors.keys() - scaled.keys():
        name = key.removesuffix(".alpha")
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")):
            up = f"{name}.{up}.weight"
            if up in scaled:
                rank = len(scaled[f"{name}.{down}.weight"])
                scaled[up] = scaled[up].float() * (float(tensors[key]) / rank)
    return scaled


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's matrices by PEFT's names: where a file mixes diffusers' own two spellings, it drops one."""
    return {
        _SPELLING.sub(lambda match: _NAMES[match[1]] + _SIDES[match[2]], key) if key.startswith("text") else key: tensor
        for key, tensor in tensors.items()
    }


def _weigh(pipeline: Any, weights: dict[str, float]) -> None:
    """Make the adapters act together, each layer those that it has, in the precision of its own weights."""
    for adapter, weight in weights.items():
        for layer in _layers(pipeline, adapter):
            own = layer.get_base_layer().weight
            device = None if own.is_meta else own.device  # a layer that is offloaded brings its own device
            layer.lora_A[adapter].to(device, own.dtype)
            layer.lora_B[adapter].to(device, own.dtype)
            layer.set_adapter([name for name in weights if name in layer.lora_A], inference_mode=True)
            layer.set_scale(adapter, weight)


def _layers(pipeline: Any, adapter: str) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    for name in COMPONENTS:
        model = getattr(pipeline, name, None)
        if model is not None:
            yield from (part for part in model.modules() if isinstance(part, LoraLayer) and adapter in part.lora_A)


def _failed(lora: Lora, reason: str) -> LoraFailed:
    return LoraFailed(
        f"The LoRA {lora.name!r} cannot be used with this model: {reason} "
        "Take one that was trained for it, or leave it out of loras."
    )
