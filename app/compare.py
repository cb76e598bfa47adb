"""`python -m app compare`: one prompt and seed uncached and under the presets, drawn and timed in this process."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from app import __version__
from app.api.resolve import Limits, pick_model, resolve
from app.api.schemas import PRESETS, parse
from app.engine.base import Job, JobResult, ModelInfo
from app.machine import processor, versions
from app.progress import bar
from app.settings import Settings, available_cores
from models.base import Step
from models.nearness import psnr

if TYPE_CHECKING:
    from app.engine.runner import RegistryRunner

THRESHOLDS = (0.05, 0.1, 0.2)
WARM_UP_STEPS = 4  # enough for a forecast of every kind to have run once
_ORDER = ("max_quality", "balanced", "max_speed", "partial")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one setting made. `request`: the fields that set it. `seconds`: of denoising, the median of the repeats.

    `psnr_db` is None where the picture is the uncached one, sample by sample. `reference`: this is the uncached row.
    """

    name: str
    request: Mapping[str, Any]
    picture: Image.Image
    cache: Mapping[str, Any]
    seconds: float
    speedup: float
    psnr_db: float | None
    reference: bool

    @property
    def decisions(self) -> str:
        return str(self.cache["decisions"])

    @property
    def hit_rate(self) -> float:
        return float(self.cache["hit_rate"])

    @property
    def reused(self) -> int:
        return int(self.cache["reused"])

    @property
    def calls(self) -> int:
        return self.reused + int(self.cache["computed"])

    @property
    def detail(self) -> str:
        """The setting in a few words."""
        if self.reference:
            return "every step computed"
        if "deepcache_preset" in self.request:
            interval, depth, start, end = PRESETS[self.request["deepcache_preset"]].values()
            window = "" if (start, end) == (0, 1000) else f", {start} to {end}"
            return f"interval {interval}, depth {depth}{window}"
        return "first-block cache"

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "name": self.name,
            "request": dict(self.request),
            "denoise_seconds": round(self.seconds, 4),
            "speedup": round(self.speedup, 3),
            "psnr_db": None if self.psnr_db is None else round(self.psnr_db, 2),
            "identical": self.psnr_db is None,
            "cache": dict(self.cache),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows, the uncached one first; `job` is its job. `conditions` is a sentence on machine, versions and timing."""

    job: Job
    rows: tuple[Row, ...]
    repeats: int
    machine: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        return self.job.params.prompt

    @property
    def settings(self) -> str:
        params = self.job.params
        words = [self.job.model, f"{params.width}x{params.height}", f"{params.steps} steps"]
        words += [" ".join(name for name in (params.sampler, params.scheduler) if name)]
        words += [f"guidance {params.guidance_scale:g}", f"seed {params.seeds[0]}"]
        return ",  ".join(word for word in words if word)

    @property
    def conditions(self) -> str:
        packages = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        runs = "one run each" if self.repeats == 1 else f"the median of {self.repeats} runs each, in turn"
        return (
            f"Denoising time, {runs}, after a warm-up. {self.machine['device']}, {self.machine['threads']} threads, "
            f"WaveSpeed {__version__}, {packages}, {self.machine['date']}."
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        params = self.job.params
        names = ("prompt", "width", "height", "steps", "guidance_scale", "sampler", "scheduler")
        return {
            "model": self.job.model,
            **{name: getattr(params, name) for name in names},
            "seed": params.seeds[0],
            "repeats": self.repeats,
            "rows": [row.as_dict() for row in self.rows],
            "machine": dict(self.machine),
            "warnings": list(self.warnings),
        }


def settings_of(model: ModelInfo) -> dict[str, dict[str, Any]]:
    """The fields that each row adds to the request, by the row's name; the first is the uncached one."""
    if model.cache == "first_block":
        cached = {f"threshold {value:g}": {"fbcache_enabled": True, "fbcache_threshold": value} for value in THRESHOLDS}
        return {"uncached": {"fbcache_enabled": False}, **cached}
    return {
        "uncached": {},
        **{name: {"deepcache_enabled": True, "deepcache_preset": name} for name in _ORDER},
    }


def compared(given: dict[str, Any], settings: Settings, repeats: int = 1) -> Comparison:
    """`given`: the fields of a request; without a size the model's own is taken.

    Each row is warmed up by a few steps; then all are timed in turn, `repeats` times, so that a machine that slows down
    slows all of them. Raises ServiceError and ModelError, which say what to ask instead.
    """
    request = parse(given)
    with bar("starting") as progress:
        from app.engine.configured import runner_here

        runner = runner_here(settings)
        catalogue = runner.catalogue()
        model = pick_model(request, catalogue)
        width, height = model.native_size
        sized = {"width": width, "height": height, **given}
        added = settings_of(model)
        jobs = {
            name: resolve(parse({**sized, **fields}), catalogue, Limits.of(settings), "command-line", "png")
            for name, fields in added.items()
        }
        runner.watch_loading(progress.loading)
        runner.load(model.name)

        def on_step(step: Step) -> None:
            progress.advance(step.decision)

        short = {name: _short(job) for name, job in jobs.items()}
        steps = [job.params.steps for job in short.values()]
        steps += [job.params.steps for job in jobs.values()] * repeats
        progress.show(completed=0, total=sum(steps))
        for name, job in short.items():
            progress.show(f"warm-up, {name}")
            runner.run(job, on_step)
        results: dict[str, list[JobResult]] = {name: [] for name in jobs}
        for _ in range(repeats):
            for name, job in jobs.items():
                progress.show(name)
                results[name].append(runner.run(job, on_step))
        machine = _machine(runner, settings.threads or available_cores())
    said = [sentence for name, job in jobs.items() for sentence in (*job.warnings, *results[name][0].warnings)]
    return Comparison(
        job=jobs["uncached"],
        rows=_rows(added, results),
        repeats=repeats,
        machine=machine,
        warnings=tuple(dict.fromkeys(said)),
    )


def _short(job: Job) -> Job:
    return replace(job, params=replace(job.params, steps=min(WARM_UP_STEPS, job.params.steps)))


def _rows(added: Mapping[str, Mapping[str, Any]], results: Mapping[str, list[JobResult]]) -> tuple[Row, ...]:
    pictures = {name: Image.open(io.BytesIO(runs[0].images[0])).convert("RGB") for name, runs in results.items()}
    seconds = {name: statistics.median(run.timings.denoise_seconds for run in runs) for name, runs in results.items()}
    return tuple(
        Row(
            name=name,
            request=fields,
            picture=pictures[name],
            cache=results[name][0].cache,
            seconds=seconds[name],
            speedup=seconds["uncached"] / seconds[name],
            psnr_db=_likeness(pictures["uncached"], pictures[name]),
            reference=name == "uncached",
        )
        for name, fields in added.items()
    )


def _likeness(reference: Image.Image, picture: Image.Image) -> float | None:
    """PSNR in dB of two pictures of one size; None for equal ones, where it has no end."""
    one, other = np.asarray(reference), np.asarray(picture)
    return None if np.array_equal(one, other) else psnr(one, other)


def _machine(runner: RegistryRunner, threads: int) -> dict[str, Any]:
    condition = runner.condition()
    return {
        "device": processor() if condition.kind == "cpu" else condition.name,
        "threads": threads,
        "versions": versions(("torch", "diffusers")),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
