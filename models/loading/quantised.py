"""Small weights: files that hold them (GGUF, fp8 plain and scaled) and networks that are made small as they load.

A file's kind is read from the file. What a network is kept in is the models file's `quantization`.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.base import Quantization
from models.errors import LoadFailed

from . import gguf

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PREFIX = "model.diffusion_model."  # of the denoiser's tensors in a file that holds other networks too
_BYTES: Mapping[Quantization, float] = {"fp8": 1, "int8": 1, "nf4": 0.5 + 4 / 64}  # nf4: a float32 for 64 numbers
_PACKAGES: Mapping[Quantization, str] = {"int8": "torchao", "nf4": "bitsandbytes"}
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's names, the older and the newer
_INPUT_SCALES = ("scale_input", "input_scale")  # for products in fp8, which are not computed here
_MARK = "scaled_fp8"
_KIND = "comfy_quant"  # JSON about one matrix, as bytes
COMPANIONS = frozenset((*_SCALES, *_INPUT_SCALES, _MARK, _KIND))
"""Last parts of the names that scaled fp8 adds to those of a network's tensors."""
LEFT_BEHIND = re.compile(r"scale|quant|absmax|codebook|zero|nested|g_idx")  # what quantisers add beside a matrix
_WHOLE = re.compile(r"norm(?!.*\.linear)|embed|shared|relative_attention_bias|\bwo\b|^conv_(in|out)|^proj_out")
_T5_WIDE = ("norm", "shared", "embed", "relative_attention_bias", r"\bwo\b")  # what T5 computes by the dtype of


def unavailable(quantization: Quantization | None, device: str) -> str | None:
    """Why weights cannot be kept so on `device`, with the remedy; None if they can."""
    package = None if quantization is None else _PACKAGES.get(quantization)
    if package is not None and find_spec(package) is None:
        return f"quantization {quantization!r} needs the package {package}: pip install .[{quantization}]."
    if quantization == "nf4" and not device.startswith("cuda"):
        return f"quantization 'nf4' needs a CUDA GPU and this server's device is {device}: take 'int8' or 'fp8'."
    return None


def tensor_bytes(name: str, shape: Sequence[int], itemsize: int, quantization: Quantization | None = None) -> int:
    """Bytes of a network's tensor once loaded at `itemsize` bytes a number.

    Quantised, matrices take fewer; in fp8 convolutions too. What fp8 leaves whole is counted whole for each kind.
    name: as diffusers and transformers have it.
    """
    small = len(shape) == 2 or (quantization == "fp8" and len(shape) > 2)
    small = small and _WHOLE.search(name) is None
    return math.ceil(math.prod(shape) * (_BYTES[quantization] if quantization and small else itemsize))


def kept_small(text_encoders: Mapping[str, Any]) -> frozenset[str]:
    """The components that `quantization` is about: the denoiser and T5. text_encoders: classes by component."""
    return frozenset(("unet", "transformer", *(name for name, cls in text_encoders.items() if "T5" in cls.__name__)))


def read_gguf(file: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a GGUF file, by names of ours → names in it. Matrices stay quantised, all else becomes numbers."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    header = gguf.read_header(file)
    tensors: dict[str, Tensor] = load_gguf_checkpoint(str(file))
    found = {}
    for name, key in names.items():
        tensor = tensors[key]
        found[name] = (
            tensor if header[key].stays_packed(key) else dequantize_gguf_tensor(tensor).reshape(header[key].shape)
        )
    return found


def descaled(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a safetensors file with fp8 turned into `dtype`, its scales multiplied in.

    Raises LoadFailed for a scale that is none of one number, or one a row, and for what other quantisers add.
    """
    import torch

    floats = (torch.float8_e4m3fn, torch.float8_e5m2)
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, last = key.rpartition(".")
        weight = tensors.get(f"{layer}.weight")
        scaled = weight is not None and weight.dtype in floats
        explained = last != _KIND or b'"float8_e' in tensor.numpy().tobytes()
        if last == _MARK or (scaled and last in COMPANIONS and explained):
            continue
        beside = (weight is not None or layer in tensors) and LEFT_BEHIND.search(last) is not None
        if beside or tensor.dtype in (torch.uint8, torch.int8):
            raise LoadFailed(
                f"The model {name!r} cannot be read: its file holds {key}, a part of a quantisation that is not "
                "supported. Take a file in fp8, scaled fp8, 16 bit, or GGUF."
            )
        if tensor.dtype in floats:
            result[key] = _multiplied(name, key, tensor, [tensors.get(f"{layer}.{end}") for end in _SCALES]).to(dtype)
        else:
            result[key] = tensor
    return result


def _multiplied(name: str, key: str, tensor: Tensor, scales: Iterable[Tensor | None]) -> Tensor:
    numbers, rows = tensor.float(), tensor.shape[:1]
    for scale in scales:
        if scale is None:
            continue
        if not scale.is_floating_point() or (scale.numel() > 1 and scale.shape not in (rows, (*rows, 1))):
            raise LoadFailed(
                f"The model {name!r} cannot be read: the scale of {key} is {scale.dtype} of shape "
                f"{tuple(scale.shape)}, where one number, or one a row, is read. Take another file of the model."
            )
        numbers = numbers * scale.float().reshape(-1, *[1] * (tensor.dim() - 1))
    return numbers


def loading(kind: Quantization | Literal["gguf"] | None, dtype: torch.dtype, library: str = "diffusers") -> Any:
    """Arguments of `from_pretrained` or `from_single_file` of a library, diffusers or transformers."""
    configs = importlib.import_module(library)
    match kind:
        case "gguf":
            config = configs.GGUFQuantizationConfig(compute_dtype=dtype)
        case "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            config = configs.TorchAoConfig(Int8WeightOnlyConfig())
        case "nf4":
            options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
            config = configs.BitsAndBytesConfig(load_in_4bit=True, **options)
        case _:  # fp8 is made of what is loaded
            return {}
    return {"quantization_config": config}


def store_fp8(network: Any, dtype: torch.dtype) -> None:
    """Keep the weights in fp8 and compute in `dtype`: diffusers' layerwise casting, with what the network skips.

    What is at both ends of the network stays whole too: it is little, and in fp8 it cost tiny-flux 1.6 dB.
    """
    import torch
    from diffusers.hooks import layerwise_casting

    small = torch.float8_e4m3fn
    if not hasattr(network, "enable_layerwise_casting"):
        layerwise_casting.apply_layerwise_casting(network, small, dtype, skip_modules_pattern=_T5_WIDE)
        return
    skipped = (*layerwise_casting.DEFAULT_SKIP_MODULES_PATTERN, "embed", "^conv_(in|out)$")
    network.enable_layerwise_casting(small, dtype, skip_modules_pattern=skipped)
    for name, module in network.named_modules():  # Flux's modulations: a quarter of its weights, skipped as "norm"
        if isinstance(module, torch.nn.Linear) and ".norm" in name and name.endswith(".linear"):
            layerwise_casting.apply_layerwise_casting_hook(module, small, dtype, non_blocking=False)
