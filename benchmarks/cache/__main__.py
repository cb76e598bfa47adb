"""The command line: measures, prints a table a model, and one JSON object as the last line.

python -m benchmarks.cache          the presets: time, counted operations and quality, in a few minutes
python -m benchmarks.cache --full   the whole grid with every peer; writes docs/benchmarks.md and its plots
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import bar
from benchmarks.cache.claims import counted, forecast_time, of_intervals, of_overheads, of_thresholds
from benchmarks.cache.measure import Bench, Result, pairs
from benchmarks.cache.overhead import FLUX_BLOCK, first_block_overheads, flux_block, overheads
from benchmarks.cache.page import COLUMNS, Section, draw, row, write
from benchmarks.cache.settings import Grid, Setting, full, presets
from benchmarks.report import ROOT, Claim, machine, show
from cache import DeepCache
from cache.flops import deepest_branch
from models.base import GenerationParams
from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.registry import Registry

_MEASURED_CODE = ("cache/*.py", "models/*.py", "benchmarks/cache/peers.py", "benchmarks/cache/measure.py")
GRID = Grid()
BATCH = 4  # pictures denoised together where quality is measured and the cache's decisions allow it
OVERHEAD_REPEATS = 40
WIDE_REPEATS = 8  # of a step that takes a second or more
FORECAST_REPEATS = 20


def fingerprint(conditions: Mapping[str, Any], weights: Path) -> str:
    """Changes with the conditions, the code that is measured or measures, and the model's files."""
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True, default=str).encode())
    code = sorted(file for pattern in _MEASURED_CODE for file in ROOT.glob(pattern))
    for file in (*code, *sorted(file for file in weights.rglob("*") if file.is_file())):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """One JSON line a measurement in `file`; a setting's last one counts, those of another fingerprint are not read."""

    def __init__(self, file: Path, mark: str) -> None:
        self.file, self.mark = file, mark
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found = [Result(**entry["result"]) for entry in map(json.loads, lines) if entry["mark"] == mark]
        self.results = {result.name: result for result in found}

    def add(self, result: Result) -> None:
        self.results[result.name] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"mark": self.mark, "result": asdict(result)}) + "\n")


def bench_of(registry: Registry, name: str, pictures: int, steps: int | None) -> Bench:
    spec, family = registry.spec(name), registry.family(name)
    width, height = spec.render_sizes[0] if spec.render_sizes else (family.native_size, family.native_size)
    guidance = family.guidance_scale if spec.guidance_scale is None else spec.guidance_scale
    given: Any = {"width": width, "height": height, "guidance_scale": guidance}
    params = GenerationParams(prompt="", steps=steps or spec.steps or family.steps, **given)
    return Bench(registry.get(name), params, pairs(pictures), BATCH)


def measure(bench: Bench, settings: Sequence[Setting], store: Store, repeats: int) -> list[Result]:
    """Each setting's result, from the store where it is there: first all qualities, then all times."""
    with bar("measuring") as progress:
        progress.show(completed=0, total=2 * len(settings))
        for setting in settings:
            progress.show(f"quality {setting.name}")
            if setting.name not in store.results:
                store.add(bench.quality(setting))
            progress.advance()
        for setting in settings:
            progress.show(f"time {setting.name}")
            if not store.results[setting.name].seconds:
                bench.timing(store.results[setting.name], setting, repeats)
                store.add(store.results[setting.name])
            progress.advance()
    return [store.results[setting.name] for setting in settings]


def demands(
    bench: Bench, settings: Sequence[Setting], results: Sequence[Result], costs: Sequence[float]
) -> list[Claim]:
    """What was asked of the model's cache, at its default depth and forecast."""
    if not costs:
        return of_thresholds(results)
    strategy = DeepCache()
    branch = deepest_branch(costs, strategy.depth)
    if branch is None:
        return []
    claims = of_intervals(results, branch)
    here = (strategy.interval, branch)
    even = [one for one in settings if one.ours and not one.default and (one.interval, one.branch) == here]
    own = {one.forecast: one for one in even}
    if {True, False} <= own.keys():
        claims.append(forecast_time(bench, own[True], own[False], FORECAST_REPEATS))
    return claims


def reuse_steps(bench: Bench, costs: Sequence[float], depths: Sequence[int]) -> list[dict[str, Any]]:
    """The overhead of a reuse step: at each branch that `depths` choose, or after a transformer's first block."""
    pipeline = bench.model.pipeline
    if not costs:
        networks = {
            "the first block": (pipeline.transformer, bench.arguments(), OVERHEAD_REPEATS),
            "Flux's first block, 256×256": (*flux_block(FLUX_BLOCK, pipeline.device), WIDE_REPEATS),
        }
        return [first_block_overheads(*of, repeats, name) for name, (*of, repeats) in networks.items()]
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    size = (bench.params.height // pipeline.vae_scale_factor, bench.params.width // pipeline.vae_scale_factor)
    first = {deepest_branch(costs, depth): depth for depth in reversed(depths)}
    branches = dict.fromkeys(deepest_branch(costs, depth) for depth in depths)
    chosen = [first[branch] for branch in branches if branch is not None]
    return [overheads(pipeline.unet, scheduler, depth, OVERHEAD_REPEATS, size) for depth in chosen]


def conditions(name: str, bench: Bench) -> str:
    params, seeds = bench.params, [seed for _, seed in bench.pairs]
    return (
        f"`{name}`, {params.width} × {params.height}, {params.steps} steps, guidance {params.guidance_scale}, "
        f"{type(bench.model.pipeline.scheduler).__name__}, {len(seeds)} pictures of "
        f"{len({prompt for prompt, _ in bench.pairs})} prompts, seeds {min(seeds)} to {max(seeds)}. Where quality is "
        f"measured they are denoised {bench.batch} at a time, except under a cache that decides for its batch as a "
        "whole."
    )


def main(
    model: Annotated[list[str] | None, typer.Option(help="Name of a model; repeat for several. Default: all.")] = None,
    whole: Annotated[bool, typer.Option("--full", help="The whole grid with every peer; writes the page.")] = False,
    pictures: Annotated[int | None, typer.Option(min=1, help="Prompts with seeds. Default: 8, with --full 32.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a setting, each beside an uncached one.")] = 5,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps. Default: the model's.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    page: Annotated[Path, typer.Option(help="With --full: the page to write.")] = ROOT / "docs" / "benchmarks.md",
    store: Annotated[Path, typer.Option(help="Finished settings; a run goes on from them.")] = (
        ROOT / "out" / "benchmark-cache.jsonl"
    ),
) -> None:
    """Measure the caches on the embedded models, beside their published peers with --full."""
    pictures = pictures or (32 if whole else 8)
    registry, measured = Registry(SPECS, DEFAULT, DEFAULT_FLUX, device), machine(device)
    sections: list[Section] = []
    for name in model or registry.names:
        with bar(f"loading {name}"):
            bench = bench_of(registry, name, pictures, steps)
        kind, costs = registry.family(name).cache, registry.reuse_costs(name)
        settings = full(bench.model.denoiser, bench.params.steps, GRID) if whole else presets(kind)
        known = {"params": asdict(bench.params), "pairs": bench.pairs, "batch": BATCH, "repeats": repeats}
        mark = fingerprint({**known, "machine": {**measured, "commit": None}}, registry.spec(name).source)
        results = measure(bench, settings, Store(store, mark), repeats)
        section = Section(name, conditions(name, bench), results)
        show(section.conditions, COLUMNS, map(row, results))
        if whole:
            section.overhead = reuse_steps(bench, costs, GRID.depths)
            section.claims = demands(bench, settings, results, costs)
            section.claims += of_overheads(section.overhead)
            draw(section.conditions, results, page.parent / section.plot)
        sections.append(section)
    if whole:
        write(page, " ".join(["python -m benchmarks.cache", *sys.argv[1:]]), measured, sections, counted())
    models = {
        section.model: {
            "conditions": section.conditions,
            "settings": {result.name: result.row() for result in section.results},
            "demands": [asdict(claim) for claim in section.claims],
            "overhead": section.overhead,
        }
        for section in sections
    }
    print(json.dumps({"benchmark": "cache", "pictures": pictures, "machine": measured, "models": models}))


if __name__ == "__main__":
    typer.run(main)
