"""A diffusers folder on disk, turned into a pipeline on a device."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .base import LoadFailed, ModelSpec

if TYPE_CHECKING:
    import torch


# Said on every run, and nothing a user can act on: numpy about how torch hands it tensors, torchsde about a time that
# rounding put 1e-7 before the interval's start.
SCHEDULER_NOISE: tuple[tuple[str, type[Warning]], ...] = (
    ("__array__ implementation doesn't accept a copy keyword", DeprecationWarning),
    ("__array_wrap__ must accept context and return_scalar", DeprecationWarning),
    (r"Should have t[ab][<>]=t[01] but got", UserWarning),
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def load_pipeline(
    pipeline_class: Any,
    text_encoders: Mapping[str, Any],
    spec: ModelSpec,
    device: str,
    dtype: torch.dtype,
    **components: object,
) -> Any:
    """The pipeline saved at `spec.source`: safetensors only, nothing fetched, weights converted to `dtype`.

    `text_encoders`: the classes of its transformers models by component. `components` replace what the folder would
    load. Raises LoadFailed when a file is missing or broken, or the folder holds another pipeline; a tensor that the
    files lack is such a failure, though the libraries would draw random numbers for it.
    """
    check_class(spec, pipeline_class.__name__)
    _check_tokenizers(spec)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    files = [file.name for file in spec.source.glob("*/*.safetensors")]
    halves = [name for name in files if ".fp16." in name]
    if halves and (dtype.itemsize == 2 or len(halves) == len(files)):
        options["variant"] = "fp16"
    lacking: list[str] = []
    try:
        for name, encoder_class in text_encoders.items():
            encoder, info = encoder_class.from_pretrained(spec.source / name, output_loading_info=True, **options)
            lacking += [f"{name}.{key}" for key in info["missing_keys"]]
            components[name] = encoder
        pipeline = pipeline_class.from_pretrained(spec.source, **options, **components)
    except MemoryError:
        raise
    except Exception as error:  # the loaders raise whatever json, safetensors, tokenizers and torch do
        raise damaged(spec, first_line(error)) from error
    modules = {name: part for name, part in pipeline.components.items() if hasattr(part, "requires_grad_")}
    for name, module in modules.items():
        lacking += [f"{name}.{key}" for key, tensor in module.named_parameters() if tensor.is_meta]
        module.eval().requires_grad_(False)
    if lacking:
        raise damaged(spec, f"{len(lacking)} tensors are missing, {lacking[0]} first.")
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
    for name in read_json(spec, "model_index.json"):
        if name.startswith("tokenizer") and not any((spec.source / name / file).is_file() for file in TOKENIZER_FILES):
            raise damaged(spec, f"{name}/ holds none of {', '.join(TOKENIZER_FILES)}.")


def read_json(spec: ModelSpec, path: str) -> dict[str, Any]:
    """A configuration file of the model's folder. Raises LoadFailed."""
    file = spec.source / path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is missing." if isinstance(error, FileNotFoundError) else f"cannot be read: {first_line(error)}"
        raise LoadFailed(
            f"The model {spec.name!r} has no usable folder: {file} {reason} "
            "The source of a model is a folder in diffusers format."
        ) from error
    if not isinstance(content, dict):
        raise LoadFailed(f"The model {spec.name!r} has no usable folder: {file} does not hold a JSON object.")
    return content


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of diffusers and transformers off stderr inside the block.

    Also what numpy and torchsde say to whoever runs certain diffusers schedulers: see SCHEDULER_NOISE.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    libraries = [diffusers_logging, transformers_logging]
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(logging.CRITICAL)
            library.disable_progress_bar()
        with warnings.catch_warnings():
            for message, category in SCHEDULER_NOISE:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def dtype_for(device: str, on_accelerator: torch.dtype) -> torch.dtype:
    """Half precision where it is fast; float32 on the CPU, whatever the files hold."""
    import torch

    return torch.float32 if torch.device(device).type == "cpu" else on_accelerator


def damaged(spec: ModelSpec, reason: str) -> LoadFailed:
    """The error for files that cannot be used; `reason` is a sentence."""
    return LoadFailed(
        f"The model {spec.name!r} could not be read from {spec.source}: {reason} "
        "Replace its files with an undamaged copy."
    )


def first_line(error: Exception) -> str:
    """What the error says first, as a sentence."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line if line.endswith(".") else line + "."
