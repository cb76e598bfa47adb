"""Calibrated placements of DeepCache's compute calls: a JSON file a model, and what a run takes from it.

The file lies with the model and moves with it: `placements.json` in its folder, or NAME.placements.json beside a single
file NAME; what a user calibrates of an embedded model or the hub's, in ~/.local/share/wavespeed/placements. It holds
one line for each combination that was calibrated (`models/tuning/calibration.py`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.deepcache.schedule import Placement, budget, ruled
from models.base import Hub, LoadFailed, ModelSpec

_EMBEDDED = Path(__file__).parents[1] / "embedded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What was found for one sampler, noise schedule, number of steps, interval and branch.

    `calls` calls of the denoiser, of which the `computed` ones compute; `gain_db` is what that gave over the uniform
    placement, in PSNR to the uncached pictures, in the mean over so many `pictures`.
    """

    sampler: str
    scheduler: str
    steps: int
    interval: int
    branch: int | None
    calls: int
    computed: tuple[int, ...]
    gain_db: float
    pictures: int

    def __post_init__(self) -> None:
        fits = len(self.computed) == budget(self.calls, self.interval) and self.computed[0] == 0
        if not fits or list(self.computed) != sorted(set(self.computed)) or self.computed[-1] >= self.calls:
            raise ValueError(
                f"{self.computed} are not {budget(self.calls, self.interval)} of {self.calls} calls from 0 on"
            )

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.sampler, self.scheduler, self.steps, self.interval, -1 if self.branch is None else self.branch)


def place(
    known: Iterable[Calibrated],
    sampler: str,
    scheduler: str,
    timesteps: Sequence[float],
    interval: int,
    branch: int | None,
) -> Placement:
    """The calibrated compute calls; else those of the nearest length, stretched; else a rule's.

    timesteps: of the run's calls.
    """
    calls = len(timesteps)
    alike = [one for one in known if (one.sampler, one.scheduler, one.interval) == (sampler, scheduler, interval)]
    if not alike:
        return ruled(timesteps, interval)
    nearest = min(alike, key=lambda one: (abs(math.log(one.calls / calls)), one.branch != branch))
    found = f"{sampler}, {scheduler}, {nearest.steps} steps"
    if nearest.calls == calls:
        return Placement(nearest.computed, calls, f"calibrated: {found}")
    return Placement(stretched(nearest.computed, nearest.calls, calls, interval), calls, f"stretched from {found}")


def stretched(computed: Sequence[int], calls: int, other: int, interval: int) -> tuple[int, ...]:
    """The same placement in a run of `other` calls instead of `calls`: the k-th of K at the same share of both."""
    knots, count = [*computed, calls], budget(other, interval)
    places = [0]
    for k in range(1, count):
        at = k / count * len(computed)
        below = int(at)
        share = (knots[below] + (at - below) * (knots[below + 1] - knots[below])) / calls
        places.append(min(max(places[-1] + 1, round(share * other)), other - count + k))
    return tuple(places)


def file_of(spec: ModelSpec) -> Path:
    """Where the model's placements are kept. Those of the embedded models and the hub's are the user's, not theirs."""
    users = Path(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "wavespeed", "placements")
    if isinstance(spec.source, Hub):
        return users / f"{spec.source.repository.replace('/', '--')}@{spec.source.revision.replace('/', '--')}.json"
    if _EMBEDDED in spec.source.parents:
        return users / f"{spec.source.name}.json"
    return _beside(spec.source)


def _beside(source: Path) -> Path:
    return source / "placements.json" if source.is_dir() else source.with_suffix(".placements.json")


def read(spec: ModelSpec) -> tuple[Calibrated, ...]:
    """What is calibrated for the model, a user's file before the one that came with it. Raises LoadFailed."""
    own = {one.key: one for one in _rows(file_of(spec), spec)}
    came = () if isinstance(spec.source, Hub) else _rows(_beside(spec.source), spec)
    return tuple(({one.key: one for one in came} | own).values())


def _rows(path: Path, spec: ModelSpec) -> tuple[Calibrated, ...]:
    """Nothing without a file. Raises LoadFailed for a broken one."""
    if not os.path.isfile(path):  # nor where a folder on the way may not be looked into
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["placements"]
        return tuple(Calibrated(**{**row, "computed": tuple(row["computed"])}) for row in rows)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise LoadFailed(
            f"{path} does not hold placements: {error}. Delete it; `python -m app calibrate {spec.name}` makes one."
        ) from error


def write(spec: ModelSpec, found: Iterable[Calibrated]) -> Path:
    """Put `found` into the model's file, in the place of what it had for the same combinations. Raises LoadFailed."""
    path = file_of(spec)
    known = {one.key: one for one in (*_rows(path, spec), *found)}
    rows = [json.dumps(asdict(known[key])) for key in sorted(known)]
    lines = ",\n  ".join(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"placements": [\n  {lines}\n]}}\n', encoding="utf-8")
    except OSError as error:
        raise LoadFailed(
            f"{path} cannot be written ({error}). Give yourself the right to, or copy the model."
        ) from error
    return path
