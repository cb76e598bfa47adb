"""How many bytes a model's weights take in memory, read from the headers of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from models.base import Quantization

from .header import BadFile, read_header
from .quantised import tensor_bytes

NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(?P<variant>\.fp16)?(-\d+-of-\d+)?(?P<late>\.fp16)?\.safetensors"
)
DROPPED = ("model_ema.",)  # beginnings of tensor names: a training run's average, which diffusers leaves in the file


def weight_files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Component → variant (`` or `fp16`) → its safetensors files, of those components that pipelines load."""
    found: dict[str, dict[str, list[Path]]] = {}
    for component in NETWORKS:
        for file in sorted((folder / component).glob("*.safetensors")):
            if match := _WEIGHTS.fullmatch(file.name):
                variant = "fp16" if match["variant"] or match["late"] else ""
                found.setdefault(component, {}).setdefault(variant, []).append(file)
    return found


def variant_of(files: Mapping[str, Mapping[str, list[Path]]], half: bool) -> str | None:
    """`fp16` where those files are the ones to load: asked for in half precision, or there are no others."""
    halves = [variants for variants in files.values() if "fp16" in variants]
    if halves and (half or all("" not in variants for variants in files.values())):
        return "fp16"
    return None


def network_bytes(
    folder: Path, itemsize: int, quantised: Mapping[str, Quantization | None] = MappingProxyType({})
) -> dict[str, int]:
    """Bytes of each component's weights once loaded at `itemsize` bytes a number, or `quantised`."""
    files = weight_files(folder)
    variant = variant_of(files, itemsize == 2) or ""
    return {
        name: loaded_bytes(variants.get(variant) or next(iter(variants.values())), itemsize, quantised.get(name))
        for name, variants in files.items()
    }


def loaded_bytes(files: Iterable[Path], itemsize: int, quantization: Quantization | None = None) -> int:
    """Bytes of the files' tensors that are kept, at `itemsize` a number; of a file without such a header, its size."""
    total = 0
    for file in files:
        try:
            total += sum(
                tensor_bytes(name, tensor.shape, itemsize, quantization)
                for name, tensor in read_header(file).items()
                if not name.startswith(DROPPED)
            )
        except (OSError, BadFile):
            total += file.stat().st_size if file.is_file() else 0  # the loader will say what is wrong with it
    return total
