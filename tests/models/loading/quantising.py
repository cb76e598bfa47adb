"""Files of small weights as their makers write them, from tensors of the published names.

GGUF as ComfyUI-GGUF's converter (blocks by the `gguf` package's own quantisers), fp8 as ComfyUI. Each writer also gives
the numbers that the file stands for, computed here, for tests to compare with. `benchmarks.cache` measures tiny-flux in
each.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
WHOLE = ("time_in.", "vector_in.", "guidance_in.", "txt_in.", "img_in.", "final_layer.")  # not quantised by anybody
FP8 = torch.float8_e4m3fn
TINY_WIDTH = 168  # of tiny-flux's streams


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and name.endswith(".weight") and not any(part in name for part in WHOLE)


def save_gguf(tensors: Tensors, file: Path, kind: str, prefix: str = "") -> Tensors:
    """Matrices as `kind`, all else as numbers. Rows that fill no blocks are cut anew, and their true shape is told."""
    writer = gguf.GGUFWriter(file, "flux")
    quantised = gguf.GGMLQuantizationType[kind]
    meant: Tensors = {}
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy()
        if not is_matrix(name, tensor):
            writer.add_tensor(prefix + name, numbers)
            meant[name] = tensor
            continue
        block = gguf.GGML_QUANT_SIZES[quantised][0]
        if numbers.shape[1] % block:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", list(map(int, numbers.shape)))
            numbers = numbers.reshape(-1, block)
        blocks = gguf.quants.quantize(numbers, quantised)
        writer.add_tensor(prefix + name, blocks, raw_dtype=quantised)
        meant[name] = torch.from_numpy(gguf.quants.dequantize(blocks, quantised).reshape(tensor.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def scaled(weight: torch.Tensor, rows: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in fp8, its scale (one, or one a row), and what they stand for."""
    largest = weight.abs().amax(1, keepdim=True) if rows else weight.abs().amax()
    scale = (largest / 448).float()
    small = (weight / scale).to(FP8)
    return small, scale, small.float() * scale


def save_scaled(tensors: Tensors, file: Path, names: str = "old", rows: bool = False) -> Tensors:
    """ComfyUI's scaled fp8. names: `old` with a mark for the whole file, `new` with one for each matrix."""
    written: Tensors = {} if names == "new" else {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    meant: Tensors = {}
    for name, tensor in tensors.items():
        if not is_matrix(name, tensor):
            written[name] = meant[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        written[name], scale, meant[name] = scaled(tensor, rows)
        if names == "old":
            written |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(1.0)}
        else:
            mark = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
            written[f"{layer}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
            written |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.tensor(0.1)}
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, file)
    return meant


@contextmanager
def narrow_flux(width: int) -> Iterator[None]:
    """diffusers' conversion of Flux splits its joined matrices at the published width, 3072."""
    from diffusers.loaders import single_file_model

    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = known["checkpoint_mapping_fn"]
    constants = tuple(width if value == 3072 else value for value in convert.__code__.co_consts)
    small = types.FunctionType(convert.__code__.replace(co_consts=constants), convert.__globals__)
    known["checkpoint_mapping_fn"] = small
    try:
        yield
    finally:
        known["checkpoint_mapping_fn"] = convert


def embedded_flux(folder: Path) -> dict[str, Any]:
    """tiny-flux's specs by what its transformer lies in, the files written into `folder`."""
    from dataclasses import replace

    from diffusers import FluxTransformer2DModel

    from models.embedded import SPECS
    from tests.models import original

    spec = next(spec for spec in SPECS if spec.name == "tiny-flux")
    assert isinstance(spec.source, Path)
    transformer: Any = FluxTransformer2DModel.from_pretrained(spec.source / "transformer")
    original.save_flux(transformer, folder / "tiny-flux.safetensors")
    tensors = load_file(folder / "tiny-flux.safetensors")
    for kind in ("Q8_0", "Q4_0"):
        save_gguf(tensors, folder / f"{kind}.gguf", kind)
    save_scaled(tensors, folder / "scaled.safetensors")
    file = replace(spec, config=spec.source)
    return {
        "unquantised": spec,
        "GGUF Q8_0": replace(file, source=folder / "Q8_0.gguf"),
        "GGUF Q4_0": replace(file, source=folder / "Q4_0.gguf"),
        "scaled fp8": replace(file, source=folder / "scaled.safetensors"),
        "scaled fp8, kept in fp8": replace(file, source=folder / "scaled.safetensors", quantization="fp8"),
        "kept in fp8": replace(spec, quantization="fp8"),
    }
