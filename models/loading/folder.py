"""A model as configured (a folder, one file, a hub repository), turned into a pipeline on a device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base import DtypeName, Hub, LoadFailed, LoadHooks, ModelSpec
from models.libraries import first_line

from .file import is_gguf, load_network, load_whole
from .footprint import NETWORKS, loaded_bytes, network_bytes, variant_of, weight_files
from .hub import fetch_file, fetch_pipeline
from .quantised import kept_small, loading, store_fp8, unavailable

if TYPE_CHECKING:
    import torch


TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def load_pipeline(
    pipeline_class: Any,
    text_encoders: Mapping[str, Any],
    spec: ModelSpec,
    device: str,
    dtype: torch.dtype,
    hooks: LoadHooks,
    *,
    single: str | None = None,
    **components: Any,
) -> Any:
    """The pipeline of `spec` in main memory, its weights in `dtype`: safetensors only, no code of the model's.

    `text_encoders`: the classes of its transformers models by component. `single`: the one network that a single file
    of this family holds; None: a file holds them all. `components` replace what would be loaded. Raises LoadFailed
    when a file is missing or broken, or holds another pipeline; a tensor that the files lack is such a failure, though
    the libraries would draw random numbers for it.
    """
    check_class(spec, pipeline_class.__name__)
    if (reason := unavailable(spec.quantization, device)) is not None:
        raise LoadFailed(f"The model {spec.name!r} is not loaded: {reason}")
    if isinstance(spec.source, Hub):
        folder = fetch_pipeline(spec, spec.source, pipeline_class, hooks.stage)
    else:
        folder = folder_of(spec)
    _check_tokenizers(spec)
    file = single_file(spec)
    small = kept_small(text_encoders)
    networks = network_bytes(folder, dtype.itemsize, dict.fromkeys(small, spec.quantization))
    if file is not None:
        in_file = {"file": loaded_bytes([file], dtype.itemsize, spec.quantization)}
        networks = in_file if single is None else {**networks, single: in_file["file"]}
    if device == "cpu":
        hooks.room(sum(networks.values()))
    lacking: list[str] = []
    try:
        if file is not None and single is not None:
            hooks.stage(single)
            components[single] = load_network(spec, _network_class(spec, single), file, folder, single, dtype)
        if file is not None and single is None:
            hooks.stage("all networks")
            index = read_json(spec, "model_index.json")
            index = {name: index[name] for name in NETWORKS if name in index}
            components |= load_whole(spec, file, folder, dtype, index)
        loaded, lacking = _load_networks(spec, folder, text_encoders, dtype, hooks, components)
        pipeline = pipeline_class.from_pretrained(folder, local_files_only=True, **components, **loaded)
    except (MemoryError, LoadFailed):
        raise
    except Exception as error:  # the loaders raise whatever json, safetensors, tokenizers and torch do
        raise damaged(spec, first_line(error)) from error
    modules = {name: part for name, part in pipeline.components.items() if hasattr(part, "requires_grad_")}
    for name, module in modules.items():
        lacking += [f"{name}.{key}" for key, tensor in module.named_parameters() if tensor.is_meta]
        module.eval().requires_grad_(False)
    if lacking := list(dict.fromkeys(lacking)):
        raise damaged(spec, f"{len(lacking)} tensors are missing, {lacking[0]} first.")
    if spec.quantization == "fp8":
        for name in modules.keys() & small - ({single} if file is not None and is_gguf(file) else set()):
            store_fp8(modules[name], dtype)
    prepare(pipeline, spec)
    return pipeline


def _load_networks(
    spec: ModelSpec,
    folder: Path,
    text_encoders: Mapping[str, Any],
    dtype: torch.dtype,
    hooks: LoadHooks,
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """The folder's networks that are not `given`, one after the other, and the names of tensors that they lack."""
    files = weight_files(folder)
    variant = variant_of(files, dtype.itemsize == 2)
    loaded: dict[str, Any] = {}
    lacking: list[str] = []
    for name in NETWORKS:
        if name in given or read_json(spec, "model_index.json").get(name, [None])[0] is None:
            continue
        hooks.stage(name)
        network_class = text_encoders.get(name) or _network_class(spec, name)
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
        if variant is not None and variant in files.get(name, {}):
            options["variant"] = variant
        if spec.quantization is not None and name in kept_small(text_encoders):
            options |= loading(spec.quantization, dtype, network_class.__module__.partition(".")[0])
        loaded[name], info = network_class.from_pretrained(folder / name, output_loading_info=True, **options)
        lacking += [f"{name}.{key}" for key in info["missing_keys"]]
    return loaded, lacking


def _network_class(spec: ModelSpec, component: str) -> Any:
    """The diffusers class that the folder's index names: none of another library, no code that came with it."""
    import diffusers

    named = read_json(spec, "model_index.json").get(component)
    library, name = named if isinstance(named, list) and len(named) == 2 else (None, None)
    network_class = getattr(diffusers, str(name), None) if library == "diffusers" else None
    if not isinstance(network_class, type) or not issubclass(network_class, diffusers.ModelMixin):
        raise damaged(spec, f"model_index.json names {named!r} for {component}, which is no network of diffusers.")
    return network_class


def prepare(pipeline: Any, spec: ModelSpec) -> None:
    """The pipeline's own settings, as the spec says."""
    if spec.vae_tiling:
        pipeline.vae.enable_tiling()
    if spec.vae_slicing:
        pipeline.vae.enable_slicing()
    if spec.prediction_type is not None:
        pipeline.scheduler.register_to_config(prediction_type=spec.prediction_type)
    pipeline.set_progress_bar_config(disable=True)


def single_file(spec: ModelSpec) -> Path | None:
    """The checkpoint, if the model is a single file."""
    return spec.source if isinstance(spec.source, Path) and spec.config is not None else None


def folder_of(spec: ModelSpec) -> Path:
    """The folder of the model's configurations on this machine."""
    if isinstance(spec.source, Hub):
        return fetch_file(spec, spec.source, "model_index.json").parent
    return spec.config or spec.source


def check_traits(spec: ModelSpec, path: str, traits: Mapping[str, object]) -> None:
    """Raise LoadFailed unless the configuration at `path` has these values; what it does not name is False."""
    config = read_json(spec, path)
    for key, expected in traits.items():
        found = config.get(key) or False
        if found != expected:
            raise LoadFailed(
                f"The model {spec.name!r} at {spec.source} is not of family {spec.family!r}: its {path} has {key} "
                f"{json.dumps(found)}, and the family {json.dumps(expected)}. Name the right family, or another model."
            )


def check_class(spec: ModelSpec, expected: str) -> None:
    """Raise LoadFailed unless the folder's index names the pipeline class `expected`."""
    declared = read_json(spec, "model_index.json").get("_class_name")
    if declared != expected:
        raise LoadFailed(
            f"The model {spec.name!r} at {spec.source} is a {declared}, but its family {spec.family!r} loads "
            f"{expected}. Name the right family, or another folder."
        )


def _check_tokenizers(spec: ModelSpec) -> None:
    """Without its files a tokenizer loads all the same, with an empty vocabulary."""
    folder = folder_of(spec)
    for name in read_json(spec, "model_index.json"):
        if name.startswith("tokenizer") and not any((folder / name / file).is_file() for file in TOKENIZER_FILES):
            raise damaged(spec, f"{name}/ holds none of {', '.join(TOKENIZER_FILES)}.")


def read_json(spec: ModelSpec, path: str) -> dict[str, Any]:
    """A configuration file of the model's folder. Raises LoadFailed."""
    file = fetch_file(spec, spec.source, path) if isinstance(spec.source, Hub) else folder_of(spec) / path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is missing." if isinstance(error, FileNotFoundError) else f"cannot be read: {first_line(error)}"
        raise LoadFailed(
            f"The model {spec.name!r} has no usable folder: {file} {reason} "
            "Name a folder in diffusers format, with model_index.json in it."
        ) from error
    if not isinstance(content, dict):
        raise LoadFailed(f"The model {spec.name!r} has no usable folder: {file} does not hold a JSON object.")
    return content


def dtype_for(spec: ModelSpec, device: str, half: DtypeName) -> torch.dtype:
    """The spec's own, else half precision where it is fast and float32 on the CPU, whatever the files hold."""
    import torch

    dtype: torch.dtype = getattr(torch, spec.dtype or ("float32" if torch.device(device).type == "cpu" else half))
    return dtype


def damaged(spec: ModelSpec, reason: str) -> LoadFailed:
    """The error for files that cannot be used; `reason` is a sentence."""
    return LoadFailed(
        f"The model {spec.name!r} could not be read from {spec.source}: {reason} "
        "Replace its files with an undamaged copy."
    )
