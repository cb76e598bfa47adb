"""A model as configured (a folder, one file, a hub repository), turned into a pipeline on a device."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from models.base import DtypeName, Hub, LoadHooks, ModelSpec
from models.errors import LoadFailed
from models.libraries import first_line

from .file import Part, contents, load_part, missing_part, parts_of, predicts, single_file
from .footprint import NETWORKS, network_bytes, variant_of, weight_files
from .hub import fetch_file, fetch_pipeline
from .quantised import kept_small, loading, store_fp8, unavailable
from .shapes import configurations
from .tokenizers import tokenizers

if TYPE_CHECKING:
    import torch


TERMINAL = 2.0**-24  # of the signal's power at the last timestep: none in float16, and no sigma is infinite
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def load_pipeline(
    pipeline_class: Any,
    text_encoders: Mapping[str, Any],
    spec: ModelSpec,
    device: str,
    dtype: torch.dtype,
    hooks: LoadHooks,
    **components: Any,
) -> Any:
    """The pipeline of `spec` in main memory, its weights in `dtype`: safetensors only, no code of the model's.

    `text_encoders`: the classes of its transformers models by component. `components` replace what would be loaded.
    Raises LoadFailed when a file is missing or broken, or holds another pipeline; a tensor that the files lack is such
    a failure, though the libraries would draw random numbers for it.
    """
    check_class(spec, pipeline_class.__name__)
    if (reason := unavailable(spec.quantization, device)) is not None:
        raise LoadFailed(f"The model {spec.name!r} is not loaded: {reason}")
    file = single_file(spec)
    parts = {} if file is None else parts_of(spec, file)
    small = kept_small(text_encoders)
    with _materialised(spec, pipeline_class, hooks) as folder:
        if device == "cpu":
            networks = network_bytes(folder, dtype.itemsize, dict.fromkeys(small, spec.quantization))
            networks |= {
                name: part.bytes(dtype.itemsize, spec.quantization if part.takes(spec.quantization) else None)
                for name, part in parts.items()
            }
            hooks.room(sum(networks.values()))
        try:
            if file is None or spec.config is not None:
                _check_tokenizers(spec, folder)
            else:
                components |= tokenizers(spec, configurations_of(spec, file))
            loaded, lacking = _load_networks(spec, folder, text_encoders, dtype, hooks, components, parts)
            none = [name for name, of in read_json(spec, "model_index.json").items() if of == [None, None]]
            components = {**dict.fromkeys(none), **components, **loaded}  # diffusers would have some of them named
            pipeline = pipeline_class.from_pretrained(folder, local_files_only=True, **components)
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
        for name in modules.keys() & small - {name for name, part in parts.items() if part.quantised}:
            store_fp8(modules[name], dtype)
    saved_schedule(
        pipeline.scheduler, *(predicts(spec, file) if file else (spec.prediction_type, spec.rescale_betas_zero_snr))
    )
    prepare(pipeline, spec)
    return pipeline


def _load_networks(
    spec: ModelSpec,
    folder: Path,
    text_encoders: Mapping[str, Any],
    dtype: torch.dtype,
    hooks: LoadHooks,
    given: Mapping[str, Any],
    parts: Mapping[str, Part],
) -> tuple[dict[str, Any], list[str]]:
    """The networks that are not `given`, one after the other, and the names of tensors that they lack.

    Those of `parts` come from there, the others from the folder.
    """
    files = weight_files(folder)
    variant = variant_of(files, dtype.itemsize == 2)
    loaded: dict[str, Any] = {}
    lacking: list[str] = []
    for name in NETWORKS:
        if name in given or read_json(spec, "model_index.json").get(name, [None])[0] is None:
            continue
        hooks.stage(name)
        network_class = text_encoders.get(name) or _network_class(spec, name)
        if name in parts:
            loaded[name] = load_part(spec, parts[name], name, network_class, folder, dtype)
            continue
        if name not in files and single_file(spec) is not None:
            raise missing_part(spec, name)
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
    pipeline.set_progress_bar_config(disable=True)


@contextmanager
def _materialised(spec: ModelSpec, pipeline_class: Any, hooks: LoadHooks) -> Iterator[Path]:
    """The model's folder on this machine: fetched, as it lies there, or written for as long as the context lasts."""
    file = single_file(spec)
    if isinstance(spec.source, Hub):
        yield fetch_pipeline(spec, spec.source, pipeline_class, hooks.stage)
    elif file is None or spec.config is not None:
        yield spec.config or spec.source
    else:
        with ExitStack() as stack:
            try:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="wavespeed-")))
                for path, config in configurations_of(spec, file).items():
                    (folder / path).parent.mkdir(exist_ok=True)
                    (folder / path).write_text(json.dumps(config), encoding="utf-8")
            except OSError as error:
                raise LoadFailed(
                    f"The model {spec.name!r} is not loaded: its configurations, some kilobytes, cannot be written to "
                    f"the folder of temporary files ({error.strerror}). Free space there, or let TMPDIR name another."
                ) from error
            yield folder


def configurations_of(spec: ModelSpec, file: Path) -> dict[str, dict[str, Any]]:
    """The published configurations of the file's family, in the file's widths. Raises LoadFailed."""
    family = contents(spec, file).family or spec.family
    return configurations(family, {name: part.network for name, part in parts_of(spec, file).items()}, spec.distilled)


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


def plain_class(index: Mapping[str, Any]) -> str:
    """The pipeline class that a folder's index names; for one that inpaints, that from noise of the same components."""
    return str(index.get("_class_name")).replace("InpaintPipeline", "Pipeline")


def check_class(spec: ModelSpec, expected: str) -> None:
    """Raise LoadFailed unless the folder's index names the pipeline class `expected`, or its sibling that inpaints."""
    declared = plain_class(read_json(spec, "model_index.json"))
    if declared != expected:
        raise LoadFailed(
            f"The model {spec.name!r} at {spec.source} is a {declared}, but its family {spec.family!r} loads "
            f"{expected}. Name the right family, or another folder."
        )


def _check_tokenizers(spec: ModelSpec, folder: Path) -> None:
    """Without its files a tokenizer loads all the same, with an empty vocabulary."""
    named = read_json(spec, "model_index.json").items()
    for name in (name for name, of in named if name.startswith("tokenizer") and of != [None, None]):
        if not any((folder / name / file).is_file() for file in TOKENIZER_FILES):
            raise damaged(spec, f"{name}/ holds none of {', '.join(TOKENIZER_FILES)}.")


def read_json(spec: ModelSpec, path: str) -> dict[str, Any]:
    """A configuration file of the model. Raises LoadFailed."""
    if (checkpoint := single_file(spec)) is not None and spec.config is None:
        return configurations_of(spec, checkpoint)[path]
    source = spec.source
    file = fetch_file(spec, source, path) if isinstance(source, Hub) else (spec.config or source) / path
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


def saved_schedule(scheduler: Any, prediction: str | None, terminal: bool | None) -> None:
    """Change what the scheduler's configuration says, where it is known better.

    terminal: betas that end in pure noise (Lin et al. 2024, algorithm 1), written out, because few of diffusers'
    schedulers have a flag for it; timesteps then begin at the last one.
    """
    changes: dict[str, Any] = {} if prediction is None else {"prediction_type": prediction}
    if terminal:
        import torch
        from diffusers.schedulers.scheduling_euler_discrete import rescale_zero_terminal_snr

        kept = (1 - rescale_zero_terminal_snr(scheduler.betas.double())).cumprod(0)
        kept[-1] = TERMINAL
        betas = 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])
        changes |= {"trained_betas": betas.tolist(), "timestep_spacing": "trailing"}
    if changes:  # what was a default is not handed on to a run's scheduler
        defaults = set(scheduler.config.get("_use_default_values", ())) - changes.keys()
        scheduler.register_to_config(**changes, _use_default_values=sorted(defaults))


def damaged(spec: ModelSpec, reason: str) -> LoadFailed:
    """The error for files that cannot be used; `reason` is a sentence."""
    return LoadFailed(
        f"The model {spec.name!r} could not be read from {spec.source}: {reason} "
        "Replace its files with an undamaged copy."
    )
