"""The operator's file of models: TOML, every key checked, each mistake named with its place and remedy.

Needs neither torch nor diffusers: the process that serves reads it before it starts a worker.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from .base import Distilled, DtypeName, Hub, ModelSpec, Offload, Prediction, Quantization
from .embedded import DEFAULT, DEFAULT_FLUX, SPECS
from .errors import ModelError
from .families import FAMILIES
from .loading.checkpoints import CheckpointFolder
from .loading.file import SUFFIXES
from .loading.header import DANGER, UNSAFE, BadFile
from .loading.recognise import recognise_file

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Repository = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=100)]


# What other programs' files call it, where the letters do not tell.
_MEANT = {"path": "folder", "directory": "folder", "checkpoint": "file", "repo": "hub", "repo_id": "hub"}


class BadModelsFile(ModelError):
    """The models file cannot be used; nothing is served until it is mended."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The models to serve and which of them a request gets that names none."""

    specs: tuple[ModelSpec, ...]
    default: str
    default_flux: str | None


class Entry(BaseModel):
    """One `[[models]]` table."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: ModelName
    family: str | None = None
    folder: str | None = None
    file: str | None = None
    hub: Repository | None = None
    revision: Word = "main"
    variant: Word | None = None
    config: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    text_encoder_2: str | None = None
    text_encoder_3: str | None = None
    tokenizer: str | None = None
    tokenizer_2: str | None = None
    tokenizer_3: str | None = None
    dtype: DtypeName | None = None
    quantization: Quantization | None = None
    prediction_type: Prediction | None = None
    rescale_betas_zero_snr: bool | None = None
    distilled: Distilled | None = None
    offload: Offload | None = None
    vae_tiling: bool = False
    vae_slicing: bool = False
    steps: int | None = Field(None, ge=1, le=150)
    guidance_scale: float | None = Field(None, ge=0, le=30)


TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
PARTS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", *TOKENIZERS)


class Contents(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    default: str | None = None
    default_flux: str | None = None
    embedded: bool = True
    models: list[Entry] = []


def embedded() -> Configuration:
    """What is served without a models file."""
    return Configuration(SPECS, DEFAULT, DEFAULT_FLUX)


def read(path: Path | None, checkpoints: CheckpointFolder | None = None) -> Configuration:
    """The configuration in the file at `path`, whose relative paths start at its folder; None: the embedded models.

    checkpoints: its models may be the default ones; they are not among the configuration's. Raises BadModelsFile.
    """
    if path is None:
        return embedded()
    try:
        contents = Contents.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        return _configuration(contents, path.parent, checkpoints)
    except ValidationError as error:
        raise BadModelsFile(f"{path}: {_fault(error)}") from None
    except (OSError, ValueError, ModelError) as error:  # tomllib's and UnicodeDecodeError are ValueErrors
        raise BadModelsFile(f"{path}: {error}") from None


def _configuration(contents: Contents, base: Path, checkpoints: CheckpointFolder | None) -> Configuration:
    specs = tuple(_spec(entry, base) for entry in contents.models) + (SPECS if contents.embedded else ())
    named = [spec.name for spec in specs]
    for name in named:
        if named.count(name) > 1:
            raise ValueError(f"two models are named {name!r}; give each a name of its own")
    served = specs if checkpoints is None else checkpoints.models(specs)[0]
    names = [spec.name for spec in served if not FAMILIES[spec.family].needs_picture]
    if not names:
        raise ValueError("there is no model that draws by itself: add a [[models]] table, or set embedded = true")
    flux = [spec.name for spec in served if FAMILIES[spec.family].pipeline.startswith("Flux")]
    for key, chosen, allowed in (
        ("default", contents.default, names),
        ("default_flux", contents.default_flux, flux),
    ):
        if chosen is not None and chosen not in allowed:
            raise ValueError(f"{key} = {chosen!r} is none of the models; there are: {', '.join(allowed) or 'none'}")
    ours = {spec.name for spec in specs}
    flux = [name for name in flux if name in ours] or flux
    return Configuration(
        specs,
        default=contents.default or (DEFAULT if contents.embedded else names[0]),
        default_flux=contents.default_flux or (flux[-1] if flux and contents.embedded else next(iter(flux), None)),
    )


def _spec(entry: Entry, base: Path) -> ModelSpec:
    where = f"model {entry.name!r}"
    given = [key for key in ("folder", "file", "hub") if getattr(entry, key) is not None]
    if len(given) != 1:
        raise ValueError(f"{where}: give one of folder, file and hub, not {' and '.join(given) or 'none of them'}")
    goes_with = {"revision": "hub", "variant": "hub", "config": "file"} | dict.fromkeys(PARTS, "file")
    for key, owner in goes_with.items():
        if key in entry.model_fields_set and given != [owner]:
            raise ValueError(f"{where}: {key} goes with {owner}; remove it")
    source = _source(entry, base, where)
    family = _family(source, where) if entry.family is None else entry.family
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1, cutoff=0)[0]
        raise ValueError(
            f"{where}: there is no family {family!r}. The nearest is {near!r}; there are: {', '.join(FAMILIES)}"
        )
    if entry.file is not None and entry.config is None and family in ("sd", "flux"):
        raise ValueError(
            f"{where}: {family} is for models that you trained, whose shapes no file tells. Name under config a folder "
            "in diffusers format with its configurations; its weights may be left out"
        )
    return ModelSpec(
        source=source,
        family=family,
        config=_config(entry, base, where),
        parts=_parts(entry, base, where),
        **entry.model_dump(exclude={"family", "folder", "file", "hub", "revision", "variant", "config", *PARTS}),
    )


def _family(source: Path | Hub, where: str) -> str:
    """Of a single file, by its tensors."""
    if isinstance(source, Hub) or source.is_dir():
        raise ValueError(f"{where}: family is required with folder and hub; there are: {', '.join(FAMILIES)}")
    try:
        found = recognise_file(source)
    except (BadFile, OSError) as error:
        raise ValueError(f"{where}: {source} {error}") from None
    if found.family is None:
        raise ValueError(f"{where}: {source.name} {found.reason}")
    return found.family


def _parts(entry: Entry, base: Path, where: str) -> dict[str, Path]:
    parts: dict[str, Path] = {}
    for key in PARTS:
        if (given := getattr(entry, key)) is not None:
            parts[key] = base / Path(given).expanduser()
            if not (parts[key].is_dir() if key in TOKENIZERS else parts[key].is_file()):
                raise ValueError(f"{where}: there is no {'folder' if key in TOKENIZERS else 'file'} {parts[key]}")
    return parts


def _source(entry: Entry, base: Path, where: str) -> Path | Hub:
    if entry.hub is not None:
        return Hub(entry.hub, entry.revision, entry.variant)
    if entry.folder is not None:
        folder = base / Path(entry.folder).expanduser()
        if folder.is_file():
            raise ValueError(f"{where}: folder = {entry.folder!r} is a file; give it as file")
        if not folder.is_dir():
            raise ValueError(f"{where}: there is no folder {folder}")
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ValueError(f"{where}: this user may not read the folder {folder}")
        return folder
    file = base / Path(entry.file or "").expanduser()
    if file.suffix.lower() not in SUFFIXES:
        if file.suffix.lower() in UNSAFE:
            raise ValueError(f"{where}: {file.name} is refused: a {file.suffix} file is a pickle, {DANGER}")
        raise ValueError(f"{where}: {file.name} is none of {', '.join(SUFFIXES)}; no other format is read")
    if not file.is_file():
        raise ValueError(f"{where}: there is no file {file}")
    if not os.access(file, os.R_OK):
        raise ValueError(f"{where}: this user may not read the file {file}")
    return file


def _config(entry: Entry, base: Path, where: str) -> Path | None:
    if entry.config is None:
        return None
    folder = base / Path(entry.config).expanduser()
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{where}: config names {folder}, which holds no model_index.json")
    return folder


def _fault(error: ValidationError) -> str:
    # A misspelt key first: it may be the one that is then missing.
    fault = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    *place, key = fault["loc"]
    inside = _place(place)
    if fault["type"] == "extra_forbidden":
        known: Mapping[str, Any] = Entry.model_fields if place else Contents.model_fields
        near = _MEANT.get(str(key)) or difflib.get_close_matches(str(key), known, n=1, cutoff=0)[0]
        return f"{inside}there is no key {str(key)!r}. The nearest is {near!r}; there are: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{inside}{key} is required"
    return f"{inside}{key} = {fault['input']!r}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def _place(place: list[int | str]) -> str:
    return f"[[models]] number {int(place[1]) + 1}: " if len(place) > 1 else ""
