"""The command line: measures, prints a table a model, and one JSON object as the last line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from app.cli import bar
from benchmarks.cache.claims import forecast_time, of_intervals, of_overheads, of_thresholds
from benchmarks.cache.measure import Bench, Result, pairs
from benchmarks.cache.overhead import first_block_overheads, overheads
from benchmarks.cache.page import Section, write
from benchmarks.cache.presets import counted
from benchmarks.cache.settings import Grid, Setting, full, presets
from benchmarks.cache.store import Store, fingerprint
from benchmarks.claim import Claim
from benchmarks.geometry import FLUX_BLOCK, TransformerHost
from benchmarks.machine import ROOT, machine
from cache import DeepCache, FirstBlockCache
from cache.cost import deepest_branch
from models.base import GenerationParams, ModelSpec
from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.registry import Registry

QUICK_PICTURES, FULL_PICTURES = 8, 32
BATCH = 4  # pictures denoised together where quality is measured and the cache's decisions allow it
OVERHEAD_REPEATS = 40
WIDE_REPEATS = 8  # of a step that takes a second or more
FORECAST_REPEATS = 20


@dataclass(frozen=True, slots=True)
class Options:
    grid: Grid
    whole: bool
    pictures: int
    repeats: int
    steps: int | None
    sampler: str | None
    device: str
    store: Path


def table(title: str, results: Sequence[Result]) -> Table:
    columns = ("setting", "denoise s", "speed-up", "operations", "predicted", "hit rate", "PSNR dB", "95 %", "SSIM")
    shown = Table(*columns, title=title)
    for column in shown.columns[1:]:
        column.justify = "right"
    for result in results:
        row = result.row()
        predicted = "–" if row["predicted_speedup"] is None else f"{row['predicted_speedup']:.2f}×"
        same = result.identical == len(result.psnr_db)
        low, high = row["psnr_interval"]
        shown.add_row(
            result.name,
            f"{row['denoise_seconds']:.3f}",
            f"{row['speedup']:.2f}×",
            f"{row['operations_speedup']:.2f}×",
            predicted,
            f"{row['hit_rate']:.2f}",
            "same" if same else f"{row['psnr_db']:.1f}",
            "" if same else f"{low:.1f}–{high:.1f}",
            f"{row['ssim']:.3f}",
        )
    return shown


def bench_of(registry: Registry, name: str, options: Options) -> tuple[Bench, list[Setting], Store]:
    spec, family = registry.spec(name), registry.family(name)
    width, height = spec.render_sizes[0] if spec.render_sizes else (family.native_size, family.native_size)
    params = GenerationParams(
        prompt="",
        width=width,
        height=height,
        steps=options.steps or spec.steps or family.steps,
        guidance_scale=family.guidance_scale if spec.guidance_scale is None else spec.guidance_scale,
        sampler=options.sampler,
    )
    model: Any = registry.get(name)
    bench = Bench(model, params, pairs(options.pictures), BATCH)
    settings = full(model.denoiser, params.steps, options.grid) if options.whole else presets(family.cache)
    conditions = {
        "params": asdict(params),
        "pairs": bench.pairs,
        "batch": bench.batch,
        "repeats": options.repeats,
        "machine": {**machine(options.device), "commit": None},
    }
    return bench, settings, Store(options.store, fingerprint(conditions, spec.source))


def measure(bench: Bench, settings: Sequence[Setting], store: Store, repeats: int, seconds: float) -> list[Result]:
    """Each setting's result, from the store where it is there: first all qualities, then all times.

    No quality is begun after two thirds of `seconds`, and no timing after all of them; what is incomplete then is
    left out.
    """
    started = time.monotonic()
    with bar("measuring") as progress:

        def going_on(stage: str, todo: list[Setting], until: float) -> Iterator[Setting]:
            progress.show(stage, completed=0, total=len(todo))
            for setting in todo:
                if time.monotonic() - started > until:
                    return
                progress.show(f"{stage} {setting.name}")
                yield setting
                progress.advance()

        unseen = [setting for setting in settings if setting.name not in store.results]
        for setting in going_on("quality", unseen, seconds * 2 / 3):
            store.add(bench.quality(setting))
        untimed = [s for s in settings if s.name in store.results and not store.results[s.name].seconds]
        for setting in going_on("time", untimed, seconds):
            result = store.results[setting.name]
            bench.timing(result, setting, repeats)
            store.add(result)
    found = [store.results[setting.name] for setting in settings if setting.name in store.results]
    return [result for result in found if result.seconds]


def demands(
    bench: Bench, settings: Sequence[Setting], results: Sequence[Result], costs: Sequence[float]
) -> list[Claim]:
    """What was asked of the model's cache, at its default depth and forecast."""
    if not costs:
        return of_thresholds(results, FirstBlockCache().forecast)
    strategy = DeepCache()
    branch = deepest_branch(costs, strategy.depth)
    if branch is None:
        return []
    claims = of_intervals(results, branch)
    own = {  # evenly placed, both of them
        one.forecast: one
        for one in settings
        if one.ours and not one.default and (one.interval, one.branch) == (strategy.interval, branch)
    }
    if {strategy.forecast, "none"} <= own.keys():
        claims.append(forecast_time(bench, own[strategy.forecast], own["none"], FORECAST_REPEATS))
    return claims


def reuse_steps(bench: Bench, costs: Sequence[float], depths: Sequence[int]) -> list[dict[str, Any]]:
    """The overhead of a reuse step: at each branch that `depths` choose, or after a transformer's first block."""
    pipeline = bench.model.pipeline
    if not costs:
        forecasts = dict.fromkeys((FirstBlockCache().forecast, "none"))
        wide = TransformerHost(FLUX_BLOCK, str(pipeline.device), torch.float32)
        arguments = wide.arguments(wide.inputs["latents"], torch.tensor(500.0))
        return [
            first_block_overheads(pipeline.transformer, bench.arguments(), forecasts, OVERHEAD_REPEATS),
            first_block_overheads(wide.transformer, arguments, forecasts, WIDE_REPEATS, FLUX_BLOCK.name),
        ]
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scale = pipeline.vae_scale_factor
    size = (bench.params.height // scale, bench.params.width // scale)
    chosen = dict.fromkeys(deepest_branch(costs, depth) for depth in depths)
    first = {branch: next(d for d in depths if deepest_branch(costs, d) == branch) for branch in chosen}
    return [
        overheads(
            pipeline.unet, scheduler, depth, dict.fromkeys((DeepCache().forecast, "none")), OVERHEAD_REPEATS, size
        )
        for branch, depth in first.items()
        if branch is not None
    ]


def conditions(spec: ModelSpec, bench: Bench) -> str:
    params = bench.params
    scheduler = bench.model.pipeline.scheduler
    seeds = [seed for _, seed in bench.pairs]
    return (
        f"`{spec.name}`, {params.width} × {params.height}, {params.steps} steps, guidance {params.guidance_scale}, "
        f"{params.sampler or type(scheduler).__name__}, {len(seeds)} pictures of {len({p for p, _ in bench.pairs})} "
        f"prompts, seeds {min(seeds)} to {max(seeds)}. Where quality is measured they are denoised {bench.batch} at a "
        "time, except under a cache that decides for its batch as a whole."
    )


def left_out(options: Options) -> str:
    """What the defaults of the full grid would measure besides."""
    whole = Grid()
    parts = []
    for name in ("intervals", "depths", "thresholds", "forecasts"):
        missing = [str(value) for value in getattr(whole, name) if value not in getattr(options.grid, name)]
        if missing:
            parts.append(f"{name} {', '.join(missing)}")
    return "; ".join(parts) + ("." if parts else "")


def numbers(text: str | None, kind: type[int] | type[float], default: Sequence[float]) -> tuple[Any, ...]:
    """A comma-separated list, or the default."""
    try:
        return tuple(default) if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no comma-separated list of numbers") from None


def known(text: str | None, names: Sequence[str]) -> tuple[str, ...]:
    """A comma-separated choice of `names`, or all of them."""
    chosen = tuple(names) if text is None else tuple(text.split(","))
    if wrong := set(chosen) - set(names):
        raise typer.BadParameter(f"{', '.join(sorted(wrong))}: there are {', '.join(names)}")
    return chosen


def main(
    model: Annotated[list[str] | None, typer.Option(help="Name of a model; repeat for several. Default: all.")] = None,
    whole: Annotated[bool, typer.Option("--full", help="The whole grid with every peer; writes the page.")] = False,
    pictures: Annotated[int | None, typer.Option(min=1, help="Prompts with seeds. Default: 8, with --full 32.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a setting, each beside an uncached one.")] = 5,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps. Default: the model's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="A sampler's name. Default: the model's own.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    intervals: Annotated[str | None, typer.Option(help="With --full: some of 2,3,4,5,6,7,8.")] = None,
    depths: Annotated[str | None, typer.Option(help="With --full: some of 0,1,2,3,4.")] = None,
    thresholds: Annotated[str | None, typer.Option(help="With --full: thresholds, separated by commas.")] = None,
    forecasts: Annotated[str | None, typer.Option(help="With --full: of none,linear,quadratic,damped,probe.")] = None,
    fewer: Annotated[str | None, typer.Option(help="With --full: shares of the steps, for shortened runs.")] = None,
    cached_fewer: Annotated[str | None, typer.Option(help="With --full: the same, under our cache.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no setting after that, divided among models.")] = None,
    page: Annotated[Path, typer.Option(help="With --full: the page to write.")] = ROOT / "docs" / "benchmarks.md",
    store: Annotated[Path, typer.Option(help="Finished settings; a run goes on from them.")] = ROOT
    / "out"
    / "benchmark-cache.jsonl",
) -> None:
    """Measure the caches on the embedded models, beside their published peers with --full."""
    whole_grid = Grid()
    grid = Grid(
        intervals=numbers(intervals, int, whole_grid.intervals),
        depths=numbers(depths, int, whole_grid.depths),
        thresholds=numbers(thresholds, float, whole_grid.thresholds),
        fewer=numbers(fewer, float, whole_grid.fewer),
        cached_fewer=numbers(cached_fewer, float, whole_grid.cached_fewer),
        forecasts=known(forecasts, whole_grid.forecasts),
    )
    pictures = pictures or (FULL_PICTURES if whole else QUICK_PICTURES)
    options = Options(grid, whole, pictures, repeats, steps, sampler, device, store)
    registry = Registry(SPECS, DEFAULT, DEFAULT_FLUX, device)
    console = Console(stderr=True)
    sections: list[Section] = []
    started, names = time.monotonic(), tuple(model or registry.names)
    for turn, name in enumerate(names):
        left = math.inf if minutes is None else (60 * minutes - (time.monotonic() - started)) / (len(names) - turn)
        with bar(f"loading {name}"):
            bench, settings, kept = bench_of(registry, name, options)
        results = measure(bench, settings, kept, repeats, left)
        said = conditions(registry.spec(name), bench)
        Console(width=130).print(table(said, results))
        section = Section(name, said, results, f"images/pareto-{name}.png")
        section.missing = sorted({setting.name for setting in settings} - {result.name for result in results})
        if whole:
            costs = registry.reuse_costs(name)
            section.overhead = reuse_steps(bench, costs, grid.depths)
            section.claims = demands(bench, settings, results, costs)
            section.claims += of_overheads(section.overhead, (DeepCache() if costs else FirstBlockCache()).forecast)
            from benchmarks.cache.plot import draw  # matplotlib, which only the page needs

            draw(said, results, page.parent / section.plot)
        sections.append(section)
    measured = machine(device)
    if whole:
        command = " ".join(["python -m benchmarks.cache", *sys.argv[1:]])
        write(page, command, measured, sections, counted(), left_out(options))
        console.print(f"wrote {page}")
    models = {
        section.model: {
            "conditions": section.conditions,
            "settings": {result.name: result.row() for result in section.results},
            "demands": [asdict(claim) for claim in section.claims],
            "overhead": section.overhead,
            "missing": section.missing,
        }
        for section in sections
    }
    print(json.dumps({"benchmark": "cache", "pictures": pictures, "machine": measured, "models": models}))


if __name__ == "__main__":
    typer.run(main)
