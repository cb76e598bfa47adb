"""The command line: measures, prints a table a model, and one JSON object as the last line.

python -m benchmarks.cache             the presets: time, operations and quality; what a UNet's cache adds; minutes
python -m benchmarks.cache --weights   tiny-flux in small weights: their loss beside the cache's; writes its table
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import bar
from benchmarks.cache import overhead
from benchmarks.cache.measure import Bench, bench_of, measured
from benchmarks.cache.page import COLUMNS, row
from benchmarks.cache.settings import presets
from benchmarks.cache.weights import COLUMNS as WEIGHTS_COLUMNS
from benchmarks.cache.weights import rows as weights_rows
from benchmarks.cache.weights import small_flux
from benchmarks.report import ROOT, conditions, fill, judged, machine, show, table
from cache import UNetDenoiser
from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.registry import Registry

PAGE = ROOT / "docs" / "benchmarks.md"


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
    here = machine(device)
    with small_flux(device) as registry:
        said = said_of(bench_of(registry, registry.names[0], pictures, steps), DEFAULT_FLUX)
        found = list(weights_rows(registry, lambda name: bench_of(registry, name, pictures, steps)))
    lines = table(WEIGHTS_COLUMNS, map(str, found))
    show([said, *lines])
    fill(page, {"weights": [f"`{command()}`: {said} {conditions(here)}", "", *lines]})
    print(json.dumps({"benchmark": "cache, weights", "machine": here, "rows": list(map(asdict, found))}))


def main(
    model: Annotated[list[str] | None, typer.Option(help="Name of a model; repeat for several. Default: all.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Small weights alone; writes their table.")] = False,
    pictures: Annotated[int, typer.Option(min=2, help="Prompts with seeds.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a setting, each beside an uncached one.")] = 5,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps. Default: the model's.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    page: Annotated[Path, typer.Option(help="With --weights: its marked part is written anew.")] = PAGE,
) -> None:
    """Measure the caches on the embedded models. Published ones: benchmarks/cache/published.py."""
    if weights:
        measure_weights(pictures, steps, device, page)
        return
    registry, here = Registry(SPECS, DEFAULT, DEFAULT_FLUX, device), machine(device)
    models: dict[str, Any] = {}
    for name in model or registry.names:
        with bar(f"loading {name}"):
            bench = bench_of(registry, name, pictures, steps)
        results = measured(bench, presets(registry.family(name).cache), repeats)
        claims = list(overhead.claims(bench)) if isinstance(bench.model.denoiser, UNetDenoiser) else []
        said = said_of(bench, name)
        show([said, *table(COLUMNS, map(row, results)), *(judged(claims) if claims else [])])
        rows = {result.name: result.row() for result in results}
        models[name] = {"conditions": said, "settings": rows, "demands": list(map(asdict, claims))}
    print(json.dumps({"benchmark": "cache", "pictures": pictures, "machine": here, "models": models}))


if __name__ == "__main__":
    typer.run(main)
