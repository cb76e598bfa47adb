"""The command line: measures, prints a table a model, and one JSON object as the last line.

python -m benchmarks.cache             the presets: time, counted operations and quality, in a few minutes
python -m benchmarks.cache --full      the whole grid with every peer; writes docs/benchmarks.md's tables
python -m benchmarks.cache --weights   tiny-flux in small weights: their loss beside the cache's; writes its table
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shelve
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import bar
from benchmarks.cache.claims import forecast_time, of_intervals, of_overheads, of_thresholds
from benchmarks.cache.measure import Bench, Result, pairs
from benchmarks.cache.overhead import overhead
from benchmarks.cache.page import COLUMNS, part, row
from benchmarks.cache.settings import EVEN, PLAIN_REUSE, Setting, branches, full, presets
from benchmarks.cache.weights import COLUMNS as WEIGHTS_COLUMNS
from benchmarks.cache.weights import rows as weights_rows
from benchmarks.cache.weights import small_flux
from benchmarks.report import ROOT, Claim, conditions, fill, machine, show, table
from cache import DeepCache, UNetDenoiser
from cache.flops import deepest_branch
from models.base import GenerationParams
from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.registry import Registry

_MEASURED_CODE = (
    "cache/**/*.py",
    "models/**/*.py",
    *(f"benchmarks/cache/{name}.py" for name in ("measure", "papers", "peers", "perceptual")),
)
PAGE, STORE = ROOT / "docs" / "benchmarks.md", ROOT / "out" / "benchmark-cache"
OVERHEAD_REPEATS = 40
FORECAST_REPEATS = 20


def fingerprint(conditions: Mapping[str, Any], weights: Path) -> str:
    """Changes with the conditions, the code that is measured or measures, and the model's files."""
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True, default=str).encode())
    code = sorted(file for pattern in _MEASURED_CODE for file in ROOT.glob(pattern))
    for file in (*code, *sorted(file for file in weights.rglob("*") if file.is_file())):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def bench_of(
    registry: Registry, name: str, pictures: int, steps: int | None, size: tuple[int, int] | None = None
) -> Bench:
    """size: width and height, pixels; None for the model's own."""
    spec, family = registry.spec(name), registry.family(name)
    own = spec.render_sizes[0] if spec.render_sizes else (family.native_size, family.native_size)
    width, height = size or own
    guidance = family.guidance_scale if spec.guidance_scale is None else spec.guidance_scale
    given: Any = {"width": width, "height": height, "guidance_scale": guidance}
    params = GenerationParams(prompt="", steps=steps or spec.steps or family.steps, **given)
    return Bench(registry.get(name), params, pairs(pictures))


def measure(bench: Bench, settings: Sequence[Setting], store: Path, mark: str, repeats: int) -> list[Result]:
    """First all qualities, then all times; what `store` has under the same mark is not measured again."""
    store.parent.mkdir(parents=True, exist_ok=True)
    keys = [f"{mark} {setting.name}" for setting in settings]
    with bar("measuring") as progress, shelve.open(str(store)) as kept:
        progress.show(completed=0, total=2 * len(settings))
        for timing, (key, setting) in itertools.product((False, True), zip(keys, settings, strict=True)):
            progress.show(f"{'time' if timing else 'quality'} {setting.name}")
            if not timing and key not in kept:
                kept[key] = bench.quality(setting)
            if timing and not kept[key].seconds:
                kept[key] = bench.timed(kept[key], setting, repeats)
            kept.sync()
            progress.advance()
        return [kept[key] for key in keys]


def demands(bench: Bench, settings: Sequence[Setting], results: Sequence[Result]) -> list[Claim]:
    """What was asked of the model's cache, at its default interval and depth."""
    denoiser, params = bench.model.denoiser, bench.params
    if not isinstance(denoiser, UNetDenoiser):
        return of_thresholds(results)
    chosen, strategy = branches(denoiser.branch_costs), DeepCache()
    branch = deepest_branch(denoiser.branch_costs, strategy.depth)
    here = {one.method: one for one in settings if (one.interval, one.branch) == (strategy.interval, branch)}
    claims = [] if branch is None else of_intervals(results, branch)
    if EVEN in here:
        claims.append(forecast_time(bench, here[EVEN], here[PLAIN_REUSE], FORECAST_REPEATS))
    scale = bench.model.pipeline.vae_scale_factor
    size = params.height // scale, params.width // scale
    rows = [overhead(bench.model.pipeline, *which, OVERHEAD_REPEATS, size) for which in chosen.items()]
    return claims + of_overheads(rows)


def said_of(bench: Bench, name: str) -> str:
    params = bench.params
    return (
        f"`{name}`, {params.width} × {params.height}, {params.steps} steps, guidance {params.guidance_scale}, "
        f"{type(bench.model.pipeline.scheduler).__name__}, {len(bench.pairs)} pictures of "
        f"{len({prompt for prompt, _ in bench.pairs})} prompts, seeds 0 to {len(bench.pairs) - 1}."
    )


def command() -> str:
    return " ".join(["python -m benchmarks.cache", *sys.argv[1:]])


def measure_weights(pictures: int, steps: int | None, device: str, page: Path) -> None:
    measured = machine(device)
    with small_flux(device) as registry:
        said = said_of(bench_of(registry, registry.names[0], pictures, steps), DEFAULT_FLUX)
        found = list(weights_rows(registry, lambda name: bench_of(registry, name, pictures, steps)))
    lines = table(WEIGHTS_COLUMNS, map(str, found))
    show([said, *lines])
    fill(page, {"weights": [f"`{command()}`: {said} {conditions(measured)}", "", *lines]})
    print(json.dumps({"benchmark": "cache, weights", "machine": measured, "rows": list(map(asdict, found))}))


def main(
    model: Annotated[list[str] | None, typer.Option(help="Name of a model; repeat for several. Default: all.")] = None,
    whole: Annotated[bool, typer.Option("--full", help="The whole grid with every peer; writes the page.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Small weights alone; writes their table.")] = False,
    pictures: Annotated[int | None, typer.Option(min=2, help="Prompts with seeds. Default: 8, with --full 32.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a setting, each beside an uncached one.")] = 5,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps. Default: the model's.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    page: Annotated[Path, typer.Option(help="With --full: its marked parts are written anew.")] = PAGE,
    store: Annotated[Path, typer.Option(help="Finished settings; a run goes on from them.")] = STORE,
) -> None:
    """Measure the caches on the embedded models, beside their published peers with --full."""
    pictures = pictures or (32 if whole else 8)
    if weights:
        measure_weights(pictures, steps, device, page)
        return
    registry, measured = Registry(SPECS, DEFAULT, DEFAULT_FLUX, device), machine(device)
    models: dict[str, Any] = {}
    for name in model or registry.names:
        with bar(f"loading {name}"):
            bench = bench_of(registry, name, pictures, steps)
        params = bench.params
        settings = full(bench.model.denoiser, params.steps) if whole else presets(registry.family(name).cache)
        known = {"params": asdict(params), "pairs": bench.pairs, "repeats": repeats}
        mark = fingerprint({**known, "machine": {**measured, "commit": None}}, registry.spec(name).source)
        results = measure(bench, settings, store, mark, repeats)
        said = said_of(bench, name)
        show([said, *table(COLUMNS, map(row, results))])
        claims = demands(bench, settings, results) if whole else []
        if whole:
            fill(page, {name: [f"`{command()}`: {said} {conditions(measured)}", "", *part(results, claims)]})
        rows = {result.name: result.row() for result in results}
        models[name] = {"conditions": said, "settings": rows, "demands": list(map(asdict, claims))}
    print(json.dumps({"benchmark": "cache", "pictures": pictures, "machine": measured, "models": models}))


if __name__ == "__main__":
    typer.run(main)
