"""A checkpoint in one `.safetensors` or `.gguf` file, in the layout of its first publication.

diffusers converts such a file, but has to be told the networks' shapes. It would fetch them from the hub, by a guess
at what the file is; here they are read from the folder that the models file names under `config`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.base import LoadFailed, ModelSpec

from . import gguf
from .quantised import PREFIX, loading, read, readable

UNSAFE = (".ckpt", ".pt", ".pth", ".bin", ".pickle", ".pkl")


def refuse_pickle(name: str, file: Path) -> None:
    """Raise LoadFailed for a file that may run code when it is read."""
    if file.suffix.lower() in UNSAFE:
        raise LoadFailed(
            f"The model {name!r} names {file}: a {file.suffix} file is a pickle, which can run any code when it is "
            "read, and is refused. Take the model's .safetensors file, or convert it on a machine that you can lose."
        )


def keys_of(spec: ModelSpec, file: Path) -> frozenset[str]:
    """Names of the file's tensors; reads its header alone. Raises LoadFailed when it is missing or cut short."""
    from safetensors import SafetensorError, safe_open

    refuse_pickle(spec.name, file)
    if is_gguf(file):
        return frozenset(readable(spec.name, file))
    try:
        with safe_open(file, "pt") as opened:
            return frozenset(opened.keys())
    except (OSError, SafetensorError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is no whole safetensors file ({error})"
        raise LoadFailed(f"The model {spec.name!r} cannot be read: {file} {reason}. Fetch the file again.") from error


def check_layout(spec: ModelSpec, file: Path, has: Iterable[str], lacks: Iterable[str]) -> None:
    """Raise LoadFailed unless some tensor's name contains each of `has`, and none any of `lacks`."""
    keys = keys_of(spec, file)
    if is_gguf(file):  # it holds the denoiser, with or without the prefix
        keys = frozenset(PREFIX + key.removeprefix(PREFIX) for key in keys)
        has = [part for part in has if not part.startswith(("first_stage_model.", "cond", "cond_stage_model."))]
    absent = [part for part in has if not any(part in key for key in keys)]
    present = [part for part in lacks if any(part in key for key in keys)]
    if absent or present:
        reason = f"has no tensors named {absent[0]}…" if absent else f"has tensors named {present[0]}…"
        raise LoadFailed(
            f"The model {spec.name!r} at {spec.source} is not of family {spec.family!r}: the file {reason} "
            "Name the right family, or another file."
        )


def is_gguf(file: Path) -> bool:
    return file.suffix.lower() == gguf.SUFFIX


def load_whole(spec: ModelSpec, file: Path, config: Path, dtype: Any, index: dict[str, Any]) -> dict[str, Any]:
    """The networks of a file that holds all; `config` gives their shapes. index: component → its library and class."""
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model

    tensors = read(spec.name, file, dtype)
    networks: dict[str, Any] = {}
    try:
        for name, (library, class_name) in index.items():
            networks[name] = load_single_file_sub_model(
                library,
                class_name,
                name,
                tensors,
                pipelines,
                is_pipeline_module=False,
                cached_model_config_path=str(config),
                local_files_only=True,
                torch_dtype=dtype,
                **(loading(spec.quantization, dtype) if name == "unet" else {}),
            )
    except NotImplementedError as error:  # torch, about tensors that were left without data
        raise ValueError(f"{file.name} lacks tensors that the networks of {config.name} have.") from error
    return networks


def load_network(spec: ModelSpec, network_class: Any, file: Path, config: Path, component: str, dtype: Any) -> Any:
    """The one network that the file holds."""
    return network_class.from_single_file(
        read(spec.name, file, dtype),
        config=str(config),
        subfolder=component,
        local_files_only=True,
        dtype=dtype,
        **loading("gguf" if is_gguf(file) else spec.quantization, dtype),
    )
