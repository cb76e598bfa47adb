"""A checkpoint in one `.safetensors` file, in the layout of its first publication.

diffusers converts such a file, but has to be told the networks' shapes. It would fetch them from the hub, by a guess
at what the file is; here they are read from the folder that the models file names under `config`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.base import LoadFailed, ModelSpec

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
    try:
        with safe_open(file, "pt") as opened:
            return frozenset(opened.keys())
    except (OSError, SafetensorError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is no whole safetensors file ({error})"
        raise LoadFailed(f"The model {spec.name!r} cannot be read: {file} {reason}. Fetch the file again.") from error


def check_layout(spec: ModelSpec, file: Path, has: Iterable[str], lacks: Iterable[str]) -> None:
    """Raise LoadFailed unless some tensor's name contains each of `has`, and none any of `lacks`."""
    keys = keys_of(spec, file)
    absent = [part for part in has if not any(part in key for key in keys)]
    present = [part for part in lacks if any(part in key for key in keys)]
    if absent or present:
        reason = f"has no tensors named {absent[0]}…" if absent else f"has tensors named {present[0]}…"
        raise LoadFailed(
            f"The model {spec.name!r} at {spec.source} is not of family {spec.family!r}: the file {reason} "
            "Name the right family, or another file."
        )


def load_whole(pipeline_class: Any, file: Path, config: Path, dtype: Any, components: dict[str, Any]) -> Any:
    """A pipeline whose networks all come from the file; `config` gives shapes, tokenizers and the scheduler."""
    try:
        return pipeline_class.from_single_file(
            str(file), config=str(config), local_files_only=True, dtype=dtype, **components
        )
    except NotImplementedError as error:  # torch, about tensors that were left without data
        raise ValueError(f"{file.name} lacks tensors that the networks of {config.name} have.") from error


def load_network(network_class: Any, file: Path, config: Path, component: str, dtype: Any) -> Any:
    """The one network that the file holds."""
    return network_class.from_single_file(
        str(file), config=str(config), subfolder=component, local_files_only=True, dtype=dtype
    )
