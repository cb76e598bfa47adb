"""A model's profile: what was found for it by drawing, in one JSON file.

It holds where DeepCache's compute calls lie (`placements.py`) and which settings give which speed and likeness
(`front.py`). The file lies with the model and moves with it: `profile.json` in its folder, or NAME.profile.json beside
a single file NAME; what a user calibrates of an embedded model or the hub's, in ~/.local/share/wavespeed/profiles
($XDG_DATA_HOME). A line for each placement and each point (`models/tuning/calibration.py`, `halving.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cache import DeepCache
from models.base import CacheName, Hub, ModelSpec
from models.embedded import DEFAULT, DEFAULT_FLUX, FOLDER, SPECS
from models.errors import LoadFailed

from .front import Front, Point
from .placements import Calibrated

Fault = Literal["damaged", "foreign"]
LENDERS: Mapping[CacheName, str] = {"deepcache": DEFAULT, "first_block": DEFAULT_FLUX}
"""The embedded model whose fronts one without a profile takes, by its cache."""
_SAMPLE = 2**16  # bytes of each weights file that a fingerprint reads


class _Foreign(Exception):
    """The file was made for other weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is known of a model. own: the sampler and scheduler that it was saved with, by name.

    fault: why a file of its was left out. borrowed: the fronts are those of another model.
    """

    own: tuple[str, str] | None = None
    placements: tuple[Calibrated, ...] = ()
    fronts: tuple[Front, ...] = ()
    fault: Fault | None = None
    borrowed: bool = False

    def with_more(self, other: Profile) -> Profile:
        """With what `other` holds, in the place of what was known of the same."""
        placements = {one.key: one for one in (*self.placements, *other.placements)}
        fronts = {one.key: one for one in (*self.fronts, *other.fronts)}
        return Profile(
            own=other.own or self.own,
            placements=tuple(placements.values()),
            fronts=tuple(fronts.values()),
            fault=other.fault or self.fault,
        )

    def seen_from(self, device: str) -> Profile:
        """With the seconds that were taken on this device alone."""
        return replace(self, fronts=tuple(front.seen_from(device) for front in self.fronts))


def file_of(spec: ModelSpec) -> Path:
    """Where the model's profile is kept. Those of the embedded models and the hub's are the user's, not theirs."""
    users = Path(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "wavespeed", "profiles")
    if isinstance(spec.source, Hub):
        return users / f"{spec.source.repository.replace('/', '--')}@{spec.source.revision.replace('/', '--')}.json"
    if FOLDER in spec.source.parents:
        return users / f"{spec.source.name}.json"
    return _beside(spec.source)


def _beside(source: Path) -> Path:
    return source / "profile.json" if source.is_dir() else source.with_suffix(".profile.json")


def fingerprint(spec: ModelSpec) -> str:
    """Of the denoiser's weights: their files' sizes and a sample of each; of the hub's, their name and revision."""
    digest = hashlib.sha256()
    if isinstance(spec.source, Hub):
        digest.update(str(spec.source).encode())
        return digest.hexdigest()[:16]
    parts = (spec.source / network for network in ("unet", "transformer"))
    inside = [file for folder in parts for file in sorted(folder.glob("*.safetensors"))]
    for file in inside if spec.source.is_dir() else [spec.source]:
        try:
            with file.open("rb") as opened:
                size = opened.seek(0, os.SEEK_END)
                opened.seek(max(0, size - _SAMPLE) // 2)
                digest.update(size.to_bytes(8) + opened.read(_SAMPLE))
        except OSError:
            continue  # the loader will say what is wrong with it
    return digest.hexdigest()[:16]


def read(spec: ModelSpec) -> Profile:
    """What is known of the model, a user's file before the one that came with it. Files with a fault are left out."""
    came = () if isinstance(spec.source, Hub) else (_beside(spec.source),)
    known = Profile()
    for path in dict.fromkeys((*came, file_of(spec))):
        known = known.with_more(_tolerant(path, spec))
    return known


def _tolerant(path: Path, spec: ModelSpec) -> Profile:
    try:
        return _of_file(path, spec)
    except _Foreign:
        return Profile(fault="foreign")
    except LoadFailed:
        return Profile(fault="damaged")


def of_user(spec: ModelSpec) -> Profile:
    """What the file that `write` writes holds now; nothing if it was made for other weights. Raises LoadFailed."""
    try:
        return _of_file(file_of(spec), spec)
    except _Foreign:
        return Profile()


def _of_file(path: Path, spec: ModelSpec) -> Profile:
    """Nothing without a file. Raises LoadFailed for a damaged one, _Foreign."""
    if not os.path.isfile(path):  # nor where a folder on the way may not be looked into
        return Profile()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made_for, (sampler, scheduler) = content["model"], content["own"]
        placements = tuple(Calibrated(**{**row, "computed": tuple(row["computed"])}) for row in content["placements"])
        fronts = tuple(map(Front.of, content["fronts"]))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise LoadFailed(
            f"{path} is no profile: {error}. Delete it; `python -m app calibrate {spec.name}` makes one."
        ) from error
    if made_for != fingerprint(spec):
        raise _Foreign
    return Profile(own=(sampler, scheduler), placements=placements, fronts=fronts)


def write(
    spec: ModelSpec, own: tuple[str, str], placements: Iterable[Calibrated] = (), fronts: Iterable[Front] = ()
) -> Path:
    """Put these into the model's file, in the place of what it had of the same. Raises LoadFailed."""
    path = file_of(spec)
    known = of_user(spec).with_more(Profile(own=own, placements=tuple(placements), fronts=tuple(fronts)))
    save(path, "\n".join(_lines(fingerprint(spec), known)) + "\n")
    return path


def save(path: Path, text: str) -> None:
    """In one move, so that no reader meets half of it. Raises LoadFailed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise LoadFailed(
            f"{path} cannot be written ({error}). Give yourself the right to, or copy the model."
        ) from error


def _lines(made_for: str, known: Profile) -> Iterator[str]:
    yield f'{{"model": "{made_for}", "own": {json.dumps(known.own)}, "placements": ['
    yield from _rows([asdict(one) for one in sorted(known.placements, key=lambda one: one.key)], "  ")
    yield '], "fronts": ['
    for left, front in enumerate(sorted(known.fronts, key=lambda one: one.key), start=1 - len(known.fronts)):
        row = front.as_dict()
        points = row.pop("points")
        yield f'  {json.dumps(row)[:-1]}, "points": ['
        yield from _rows(points, "    ")
        yield "  ]}" + ("," if left else "")
    yield "]}"


def _rows(rows: Sequence[dict[str, Any]], indent: str) -> Iterator[str]:
    for left, row in enumerate(rows, start=1 - len(rows)):
        yield indent + json.dumps(row) + ("," if left else "")


def processor() -> str:
    """The CPU's name; Linux keeps it where `platform` does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def borrowed(known: Profile, cache: CacheName, branch_costs: Sequence[float]) -> Profile:
    """For a model without fronts: the embedded model's with the same cache, without what holds for that one alone.

    Operations are counted on the model that draws. branch_costs: of this model, empty if it has no branches.
    """
    lender = next(spec for spec in SPECS if spec.name == LENDERS[cache])
    lent = read(lender)
    fronts = [
        replace(
            front, device=None, points=tuple(_counted(front, point, branch_costs) for point in front.portable.points)
        )
        for front in lent.fronts
    ]
    return replace(known, own=known.own or lent.own, fronts=tuple(fronts), borrowed=True)


def _counted(front: Front, point: Point, branch_costs: Sequence[float]) -> Point:
    """The point with the operations that it saves on a UNet with these branches, and without seconds."""
    strategy = point.strategy
    if not isinstance(strategy, DeepCache):
        return replace(point, seconds=None)
    from cache.deepcache.schedule import budget
    from cache.flops import deepest_branch

    branch = deepest_branch(branch_costs, strategy.depth)
    cost = 0.0 if branch is None else branch_costs[branch] / (2 if strategy.guidance == "reuse" else 1)
    computed = budget(point.steps, strategy.interval)
    return replace(point, operations=front.steps / (computed + (point.steps - computed) * cost), seconds=None)
