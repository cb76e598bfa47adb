"""The operator's folder of checkpoints: each file, or diffusers folder, that lies there is a model by its name."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from models.base import Hub, ModelSpec

from .file import SUFFIXES
from .folder import plain_class
from .header import UNSAFE, BadFile
from .recognise import PARTS, WORDS, FewSteps, Role, few_steps, recognise_file
from .shapes import unusual
from .tokenizers import T5_FOLDER

_LINK = (
    "is a link that leads out of the folder of checkpoints, and is not followed: bring the file itself, or let "
    "WAVESPEED_CHECKPOINT_FOLDER name where it lies"
)
_REFINER = "StableDiffusionXLImg2ImgPipeline"
_FAMILIES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3.5",
    "FluxFillPipeline": "flux-fill",
    "ChromaPipeline": "chroma",
    "QwenImagePipeline": "qwen-image",
}
"""Pipeline class of a diffusers folder → its family, where that is all that there is to know."""
_KLEIN, _Z_IMAGE = "Flux2KleinPipeline", "ZImagePipeline"
_PIPELINES = ("StableDiffusionPipeline", _REFINER, "FluxPipeline", _KLEIN, _Z_IMAGE, *_FAMILIES)
_TURBO_SHIFT = 3.0  # of Z-Image-Turbo's schedule, by which alone its folder differs from Z-Image's, whose is 6
Stamp = tuple[tuple[int, int], ...]
"""When each of a model's files was changed, in nanoseconds, and its bytes."""


def stamp_of(*paths: Path) -> Stamp:
    """Of files, and of all that lies in folders; what is not there is left out."""
    found = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            try:
                status = file.stat()
            except OSError:
                continue
            found.append((status.st_mtime_ns, status.st_size))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What lies at a path of the folder. family: None where it is no model, for the `reason`.

    networks: what each in it is; lone: it is a part, which other models take. few_steps: it is distilled.
    """

    path: Path
    stamp: Stamp
    family: str | None = None
    reason: str = ""
    networks: frozenset[Role] = frozenset()
    few_steps: FewSteps | None = None

    @property
    def lone(self) -> bool:
        return self.family is None and not self.networks & {"unet", "flux"}


class CheckpointFolder:
    """`path` may be missing: it is empty then. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, _Entry] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[CheckpointFolder], tuple[Path]]:
        return type(self), (self.path,)  # to a worker process, which looks for itself

    def scan(self) -> bool:
        """Look again; whether something is new, gone or changed. Headers are read of what is."""
        with self._lock:
            before, found = self._entries, {}
            for name, path, reason in self._walk():
                stamp, old = stamp_of(path), before.get(name)
                found[name] = old if old is not None and old.stamp == stamp else _read(path, stamp, reason)
            self._entries = found
            return found != before

    def models(self, configured: Sequence[ModelSpec]) -> tuple[list[ModelSpec], dict[str, str]]:
        """The configured models and those of the folder; and name → why what else lies there is not served.

        A configured model keeps its name, and is all that is made of its file. The parts that it lacks are looked for
        here. In the folder a model is called by its stem; where that is taken, by its path without the suffix, and
        where that is too, by its path.
        """
        entries = dict(self._entries)
        taken = {spec.source.resolve() for spec in configured if isinstance(spec.source, Path)}
        served = [self._completed(spec, entries.values()) for spec in configured]
        unserved: dict[str, str] = {}
        rest = {key: entry for key, entry in entries.items() if entry.path.resolve() not in taken}
        names = _names([key for key, entry in rest.items() if entry.family], {spec.name for spec in configured})
        names |= _names(
            [key for key in rest if key not in names], {*names.values(), *(spec.name for spec in configured)}
        )
        for key, name in names.items():
            entry = rest[key]
            if entry.family is None:
                unserved[name] = f"{key} {entry.reason}."
                continue
            spec = _distilled(ModelSpec(name=name, family=entry.family, source=entry.path), entry.few_steps)
            if entry.networks:
                spec, missing = self._with_parts(spec, entry.networks, entries.values())
                if missing:
                    unserved[name] = f"{key} {missing}."
                    continue
            served.append(spec)
        return served, unserved

    def _completed(self, spec: ModelSpec, entries: Iterable[_Entry]) -> ModelSpec:
        if isinstance(spec.source, Hub):
            return _distilled(spec)
        entry = _read(spec.config or spec.source, (), "")
        spec = _distilled(spec, entry.few_steps)
        return self._with_parts(spec, entry.networks, entries)[0] if entry.family and entry.networks else spec

    def _with_parts(
        self, spec: ModelSpec, networks: Collection[Role], entries: Iterable[_Entry]
    ) -> tuple[ModelSpec, str]:
        """The spec with the files that hold what its own lacks, and what none holds: the end of a sentence."""
        parts = dict(spec.parts)
        largest = sorted(entries, key=lambda entry: -sum(size for _, size in entry.stamp))  # the most precise first
        lacking: dict[str, str] = {}
        for component, role in PARTS.get(spec.family, {}).items():
            if role in networks or component in parts:
                continue
            lone = [entry for entry in largest if entry.lone and role in entry.networks]
            alike = [entry for entry in largest if entry.family == spec.family and role in entry.networks]
            if role == "vae4":  # SD's and SDXL's have the same tensors: only a whole file says whose it is
                lone, others = [], lone
            else:
                others = lone if role == "vae16" and len(lone) > 1 else []  # Flux's and SD3's, too
            if others and not alike:
                names = ", ".join(entry.path.name for entry in others)
                lacking[component] = f"{WORDS[role]} (tensors do not tell whether its own is here: {names})"
            elif found := lone or alike:
                parts[component] = found[0].path
            else:
                lacking[component] = WORDS[role]
        if lacking:
            words, keys = " and ".join(lacking.values()), " and ".join(f"`{name}`" for name in lacking)
            remedy = f"put what is missing into the folder of checkpoints, or name it as {keys} in the models file"
            return spec, f"lacks {words}: {remedy}"
        for component, role in PARTS.get(spec.family, {}).items():
            if role == "t5":
                parts.setdefault(component.replace("text_encoder", "tokenizer"), self.path / T5_FOLDER)
        return replace(spec, parts=parts), ""

    def _walk(self) -> Iterator[tuple[str, Path, str]]:
        """Path from the folder, path, and why it is not even opened, if so."""
        root = self.path.resolve()
        unreadable: list[OSError] = []

        def leads_out(path: Path) -> bool:
            return path.is_symlink() and not path.resolve().is_relative_to(root)

        for at, folders, files in os.walk(root, onerror=unreadable.append):
            here = Path(at)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if "model_index.json" in files:
                folders.clear()
                yield _below(here, root), here, _LINK if any(map(leads_out, here.rglob("*"))) else ""
                continue
            if here != root and any((here / name / "config.json").is_file() for name in ("unet", "transformer")):
                folders.clear()
                yield (
                    _below(here, root),
                    here,
                    "is a diffusers folder without its model_index.json: fetch the whole folder",
                )
                continue
            for path in (here / name for name in folders):
                if leads_out(path):
                    yield _below(path, root), path, _LINK
            for path in (here / name for name in sorted(files)):
                if path.suffix.lower() in (*SUFFIXES, *UNSAFE):
                    yield _below(path, root), path, _LINK if leads_out(path) else ""
        for error in unreadable:
            path = Path(error.filename)
            if path.exists():
                yield _below(path, root), path, f"cannot be read ({error.strerror}): give this user the right to"


def _below(path: Path, root: Path) -> str:
    """Fit for a message, whatever bytes the name is made of."""
    text = path.relative_to(root).as_posix() if path != root else root.name
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _read(path: Path, stamp: Stamp, reason: str) -> _Entry:
    if reason:
        return _Entry(path, stamp, reason=reason)
    try:
        if path.is_dir():
            return _Entry(path, stamp, _family_of_folder(path), few_steps=_few_steps_of_folder(path))
        found = recognise_file(path)
    except BadFile as error:
        return _Entry(path, stamp, reason=str(error).removesuffix("."))
    except OSError as error:
        return _Entry(path, stamp, reason=f"cannot be read ({error.strerror})")
    networks = frozenset(found.networks)
    if found.family is not None and (odd := unusual(found.family, found.networks)):
        return _Entry(path, stamp, None, odd, networks)
    return _Entry(path, stamp, found.family, found.reason, networks, found.few_steps)


def _family_of_folder(folder: Path) -> str:
    """Raises BadFile."""
    index = _json(folder / "model_index.json")
    named = plain_class(index)
    if named not in _PIPELINES:
        raise BadFile(f"is a {named}, and of diffusers folders {', '.join(_PIPELINES)} are served")
    if named in _FAMILIES:
        return _FAMILIES[named]
    if named == "FluxPipeline":
        return "flux-dev" if _json(folder / "transformer" / "config.json").get("guidance_embeds") else "flux-schnell"
    if named == _KLEIN:
        return "flux2-klein" if index.get("is_distilled") else "flux2-klein-base"
    if named == _Z_IMAGE:
        shift = _json(folder / "scheduler" / "scheduler_config.json").get("shift")
        return "z-image-turbo" if shift == _TURBO_SHIFT else "z-image"
    if named == _REFINER and not index.get("requires_aesthetics_score"):
        raise BadFile(f"is a {_REFINER} and no refiner, by its model_index.json: save it as StableDiffusionXLPipeline")
    if named == _REFINER:
        return "sdxl-refiner"
    return "sd21" if _json(folder / "unet" / "config.json").get("use_linear_projection") else "sd15"


def _few_steps_of_folder(folder: Path) -> FewSteps | None:
    """By its scheduler: LCM's, or Euler from the last timestep on, as SD-Turbo and SDXL-Turbo are published.

    Models whose schedule ends in pure noise are drawn from the last timestep on, too. Raises BadFile.
    """
    config = _json(folder / "scheduler" / "scheduler_config.json")
    if config.get("_class_name") == "LCMScheduler":
        embeds = _json(folder / "unet" / "config.json").get("time_cond_proj_dim")
        return FewSteps("lcm", 4, None if embeds else 1.0)
    trailing = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
    euler = config.get("_class_name") in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    noise = config.get("prediction_type", "epsilon") == "epsilon"
    return FewSteps("turbo", 4, 1.0) if trailing and euler and noise else None


def _distilled(spec: ModelSpec, found: FewSteps | None = None) -> ModelSpec:
    """With what is right for its kind where the operator says nothing; the operator's word on the kind goes first."""
    few = found if spec.distilled is None else few_steps(spec.distilled, spec.family)
    if few is None:
        return spec
    steps = few.steps if spec.steps is None else spec.steps
    scale = few.guidance_scale if spec.guidance_scale is None else spec.guidance_scale
    return replace(spec, distilled=few.kind, steps=steps, guidance_scale=scale)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadFile(f"lacks {file.parent.name}/{file.name}: fetch the whole folder") from None
    except (OSError, ValueError) as error:
        raise BadFile(f"has a {file.name} that cannot be read: fetch it again") from error
    if not isinstance(content, dict):
        raise BadFile(f"has a {file.name} that holds no JSON object: fetch it again")
    return content


def _names(keys: Collection[str], reserved: Collection[str]) -> dict[str, str]:
    """Path from the folder → what the model is called, each once."""
    names: dict[str, str] = {}
    for form in (_stem, _without_suffix, str):
        left = {key: form(key) for key in keys if key not in names}
        counted = Counter(left.values())
        taken = {*reserved, *names.values()}
        names |= {key: name for key, name in left.items() if counted[name] == 1 and name not in taken}
    return names


def _without_suffix(key: str) -> str:
    suffix = Path(key).suffix
    return key.removesuffix(suffix) if suffix.lower() in (*SUFFIXES, *UNSAFE) else key


def _stem(key: str) -> str:
    return _without_suffix(key).rpartition("/")[2]
