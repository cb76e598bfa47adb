"""`python -m app compare`: one prompt and seed uncached and under the presets, drawn and timed in this process.

And `demo`, which is the same at wished speeds, with nothing to type.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from app import __version__
from app.cli import INK, PALE, RULE, Canvas, wrapped
from app.cli.generate import HERE, checked_early, runner_here, with_fields
from app.engine.types import Job, JobResult, ModelInfo
from app.http.resolve import pick_model, resolve
from app.http.schemas import PRESETS, parse
from app.images import encode, format_of
from app.settings import Settings, default_threads, read_settings
from models.base import Step
from models.tuning.nearness import psnr
from models.tuning.profile import processor

THRESHOLDS = (0.05, 0.1, 0.2)
SPEEDUPS = (2.0, 3.0)
"""Of the demonstration."""
WARM_UP_STEPS = 4  # enough for a forecast of every kind to have run once
_ORDER = ("max_quality", "balanced", "max_speed", "partial")
# What the rows set, and what a sheet of one picture a row has no use for.
_LEFT_OUT = "(deepcache|fbcache|cache)_.*|prompt|num_images|batch_size|output_format|enable_preview|deadline_seconds"


@with_fields(leave=_LEFT_OUT)
def compare(
    prompt: Annotated[str, typer.Argument(help="What the pictures show.")] = "a stormy island at twilight",
    output: Annotated[Path, typer.Option("--output", "-o", help="The sheet: .png, .jpg or .webp.")] = Path(
        "comparison.png"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each setting; their median time counts.")] = 1,
    difference: Annotated[bool, typer.Option("--difference", help="Show how far each is from uncached.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Draw one prompt uncached and under the presets, on a sheet with times, PSNR, hit rates and every decision.

    Without a size the model's own is taken, without a seed 0.
    """
    _compare({"prompt": prompt, "seed": 0, **fields}, output, repeats, difference=difference, as_json=as_json)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The sheet: .png, .jpg or .webp.")] = Path("demo.png"),
) -> None:
    """Draw one scene uncached, twice and three times as fast, side by side with their times."""
    _compare({"prompt": "a stormy sea at sunset", "seed": 1}, output, speedups=SPEEDUPS)


def _compare(
    given: dict[str, Any],
    output: Path,
    repeats: int = 1,
    speedups: Sequence[float] = (),
    *,
    difference: bool = False,
    as_json: bool = False,
) -> None:
    output_format, settings = format_of(output), read_settings()
    checked_early(given, settings)
    comparison = compared(given, settings, repeats, speedups)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(encode(sheet(comparison, difference=difference), output_format))
    for sentence in comparison.warnings:
        print(f"note: {sentence}", file=sys.stderr)
    if as_json:
        print(json.dumps({**comparison.as_dict(), "sheet": str(output)}))
        return
    for row in comparison.rows:
        likeness = "identical" if row.psnr_db is None else f"{row.psnr_db:.1f} dB"
        print(f"{row.name:<15} {row.seconds:6.2f} s {row.speedup:5.2f}× {likeness:>10}  {row.cache['decisions']}")
    print(output)


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
    def detail(self) -> str:
        """The setting in a few words."""
        if self.reference:
            return "every step computed"
        if "deepcache_preset" in self.request:
            interval, depth, start, end = PRESETS[self.request["deepcache_preset"]].values()
            window = "" if (start, end) == (0, 1000) else f", {start} to {end}"
            return f"interval {interval}, depth {depth}{window}"
        return "as near as it can be" if "cache_speedup" in self.request else "first-block cache"

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
            f"Denoising time, {runs}, after a warm-up. {self.machine['device']}, {_threads(self.machine['threads'])}, "
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


def settings_of(model: ModelInfo, speedups: Sequence[float] = ()) -> dict[str, dict[str, Any]]:
    """The fields that each row adds to the request, by the row's name; the first is the uncached one.

    `speedups`: of wished speeds instead of presets.
    """
    if speedups:
        plain = {"fbcache_enabled": False} if model.cache == "first_block" else {}
        return {"uncached": plain, **{f"{wished:g} times as fast": {"cache_speedup": wished} for wished in speedups}}
    if model.cache == "first_block":
        cached = {f"threshold {value:g}": {"fbcache_enabled": True, "fbcache_threshold": value} for value in THRESHOLDS}
        return {"uncached": {"fbcache_enabled": False}, **cached}
    return {"uncached": {}, **{name: {"deepcache_enabled": True, "deepcache_preset": name} for name in _ORDER}}


def compared(given: dict[str, Any], settings: Settings, repeats: int = 1, speedups: Sequence[float] = ()) -> Comparison:
    """`given`: the fields of a request; without a size the model's own is taken.

    Each row is warmed up by a few steps; then all are timed in turn, `repeats` times, so that a machine that slows down
    slows all of them. Raises ServiceError and ModelError, which say what to ask instead.
    """
    request = parse(given)
    with runner_here(settings) as (progress, runner):
        catalogue = runner.catalogue()
        model = pick_model(request, catalogue)
        sized = {**dict(zip(("width", "height"), model.native_size, strict=True)), **given}
        added = settings_of(model, speedups)
        jobs = {name: resolve(parse({**sized, **fields}), catalogue, settings, HERE) for name, fields in added.items()}
        runner.load(model.name)

        def on_step(step: Step) -> None:
            progress.advance(step.decision)

        short = {
            name: replace(job, params=replace(job.params, steps=min(WARM_UP_STEPS, job.params.steps)))
            for name, job in jobs.items()
        }
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
        condition = runner.condition()
        machine = {
            "device": processor() if condition.kind == "cpu" else condition.name,
            "threads": settings.threads or default_threads(),
            "versions": versions(("torch", "diffusers")),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }
    said = [sentence for name, job in jobs.items() for sentence in (*job.warnings, *results[name][0].warnings)]
    return Comparison(
        job=jobs["uncached"],
        rows=_rows(added, results),
        repeats=repeats,
        machine=machine,
        warnings=tuple(dict.fromkeys(said)),
    )


def _rows(added: Mapping[str, Mapping[str, Any]], results: Mapping[str, list[JobResult]]) -> tuple[Row, ...]:
    pictures = {name: Image.open(io.BytesIO(runs[0].images[0])).convert("RGB") for name, runs in results.items()}
    seconds = {name: statistics.median(run.timings.denoise_seconds for run in runs) for name, runs in results.items()}
    uncached = np.asarray(pictures["uncached"])
    rows = []
    for name, fields in added.items():
        picture = np.asarray(pictures[name])
        row = Row(
            name=name,
            request=fields,
            picture=pictures[name],
            cache=results[name][0].cache,
            seconds=seconds[name],
            speedup=seconds["uncached"] / seconds[name],
            psnr_db=None if np.array_equal(uncached, picture) else psnr(uncached, picture),
            reference=name == "uncached",
        )
        rows.append(row)
    return tuple(rows)


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of each distribution, None where it is not installed."""
    return {package: next((one.version for one in distributions(name=package)), None) for package in packages}


_MARGIN, _GAP = 28, 20
_TILE = (340, 400)  # pixels, the most that a picture is shown in
_TITLE, _LARGE, _TEXT, _SMALL = 30, 28, 22, 18
_LINE = 1.35  # of a text's size
_STRIP = 26
_GAINS = (1, 2, 4, 8, 16, 32, 64)


def sheet(comparison: Comparison, *, difference: bool = False) -> Image.Image:
    """RGB. `difference`: below each picture how far it is from the uncached one, made brighter alike for all."""
    rows = comparison.rows
    wide, high = rows[0].picture.size
    scale = min(_TILE[0] / wide, _TILE[1] / high)
    tile = round(wide * scale), round(high * scale)
    width = 2 * _MARGIN + len(rows) * tile[0] + (len(rows) - 1) * _GAP
    title = wrapped(f"“{comparison.job.params.prompt}”", _TITLE, width - 2 * _MARGIN - 260, 2)
    footer = wrapped(comparison.conditions, _SMALL, width - 2 * _MARGIN, 4)
    top = _MARGIN + _high(_TITLE) * len(title) + _high(_TEXT) + _GAP
    words = _high(_LARGE) + 4 * _high(_TEXT) + _GAP // 2
    shown = tile[1] + words + _STRIP + _GAP
    bottom = top + shown + (tile[1] + _high(_TEXT) + _GAP if difference else 0)
    page = Canvas(width, bottom + _high(_SMALL) * len(footer) + _MARGIN)
    for number, line in enumerate(title):
        page.write((_MARGIN, _MARGIN + number * _high(_TITLE)), line, _TITLE)
    page.write((_MARGIN, _MARGIN + len(title) * _high(_TITLE)), comparison.settings, _TEXT, PALE)
    page.legend(width - _MARGIN, _MARGIN + 4, _TEXT)
    differences = _differences(rows) if difference else None
    for number, row in enumerate(rows):
        left = _MARGIN + number * (tile[0] + _GAP)
        page.image.paste(row.picture.resize(tile, Image.Resampling.LANCZOS), (left, top))
        _describe(page, row, left, top + tile[1] + _GAP // 2, tile[0])
        if differences is not None:
            gain, pictures = differences
            if not row.reference:
                page.write((left, top + shown), f"difference, {gain} times", _TEXT, PALE)
                brighter = pictures[number].resize(tile, Image.Resampling.LANCZOS)
                page.image.paste(brighter, (left, top + shown + _high(_TEXT)))
    page.draw.line((_MARGIN, bottom - 8, width - _MARGIN, bottom - 8), fill=RULE)
    for number, line in enumerate(footer):
        page.write((_MARGIN, bottom + number * _high(_SMALL)), line, _SMALL, PALE)
    return page.image


def _describe(page: Canvas, row: Row, left: int, top: int, width: int) -> None:
    page.write((left, top), row.name, _LARGE)
    top += _high(_LARGE)
    reused, calls = row.cache["reused"], row.cache["reused"] + row.cache["computed"]
    likeness = "identical to uncached" if row.psnr_db is None else f"{row.psnr_db:.1f} dB PSNR to uncached"
    for line, colour in (
        (row.detail, PALE),
        (f"{row.seconds:.2f} s" + (f",  {row.speedup:.2f} times as fast" if not row.reference else ""), INK),
        ("what the others are held against" if row.reference else likeness, INK),
        (f"hit rate {row.cache['hit_rate']:.2f}  ({reused} of {calls})", INK),
    ):
        page.write((left, top), line, _TEXT, colour)
        top += _high(_TEXT)
    page.strip((left, top + 6, left + width, top + 6 + _STRIP), row.cache["decisions"])


def _differences(rows: tuple[Row, ...]) -> tuple[int, list[Image.Image]]:
    """The gain, and a picture of |difference| · gain a row; the gain is the highest that clips one sample in 1000."""
    base = np.asarray(rows[0].picture, np.int16)
    found = [np.abs(np.asarray(row.picture, np.int16) - base) for row in rows]
    bright = max(1.0, float(max(np.quantile(one, 0.999) for one in found)))
    gain = max((gain for gain in _GAINS if gain * bright <= 255), default=1)
    return gain, [Image.fromarray(np.minimum(one * gain, 255).astype(np.uint8)) for one in found]


def _high(size: int) -> int:
    return round(size * _LINE)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
