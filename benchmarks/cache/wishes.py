"""`cache_speedup` held to what it promises: wishes beside presets and fewer steps, on pictures that no calibration saw.

python -m benchmarks.cache.wishes tiny-sd --sampler euler --steps 20
WAVESPEED_MODELS_FILE=models.toml python -m benchmarks.cache.wishes mine --size 512 512
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from app.engine.runner import RegistryRunner
from app.engine.types import ModelInfo
from app.settings import read_settings
from benchmarks.cache.front import in_operations, shortened
from benchmarks.cache.measure import Bench, Result, bench_of, difference, interval, measured
from benchmarks.cache.settings import FEWER, FEWER_STEPS, PLAIN, WISHED, Setting, ours, presets, shares
from benchmarks.report import conditions, machine, show, table
from models.models_file import read
from models.registry import Registry
from models.tuning.choice import Wish, choose

WISHES = (1.5, 2.0, 3.0, 4.0)
COLUMNS = "setting | steps | in time | in operations | PSNR dB | 95 % | over fewer steps, dB | over presets as fast, dB"


def wished(info: ModelInfo, bench: Bench, wish: float) -> Setting:
    """What a request would get."""
    params = bench.params
    asked = Wish(wish, None, params.steps, params.guidance_scale, params.sampler, params.scheduler)
    choice = choose(asked, info.name, info.cache, info.profile)
    return Setting(WISHED, f"{wish:g}", steps=choice.steps, make=ours(choice.strategy))


def rows(results: Sequence[Result]) -> list[str]:
    """A line a setting; those that were wished for are held against the others."""
    return [_row(one, results) for one in results]


def _row(one: Result, results: Sequence[Result]) -> str:
    low, high = interval(one.psnr_db)
    told = (
        f"{one.name} | {one.steps} | {one.speedup:.2f}× | {one.operations_speedup:.2f}× | {one.mean_psnr:.1f} "
        f"| {low:.1f}–{high:.1f}"
    )
    if one.method != WISHED:
        return f"{told} | | "
    fewer = shortened(results, in_operations, one.operations_speedup)
    faster = [
        other
        for other in results
        if other.method not in (WISHED, FEWER) and other.operations_speedup >= one.operations_speedup
    ]
    against = ", ".join(f"{other.label} {_gain(one, other)}" for other in faster)
    return f"{told} | {'' if fewer is None else f'{_gain(one, fewer)} ({fewer.label} steps)'} | {against}"


def _gain(one: Result, other: Result) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*difference(one, other))


def main(
    model: Annotated[str, typer.Argument(help="An embedded model, or one of the models file.")],
    sampler: Annotated[str | None, typer.Option(help="Default: the model's own.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Default: the model's.")] = None,
    size: Annotated[tuple[int, int] | None, typer.Option(help="Width and height, pixels. Default: its own.")] = None,
    pictures: Annotated[int, typer.Option(min=2, help="Prompts with seeds.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a setting, each beside an uncached one.")] = 5,
    wish: Annotated[list[float], typer.Option(min=1, max=6, help="Repeat for several.")] = list(WISHES),  # noqa: B006
) -> None:
    """Draw what each wish chooses, the presets and fewer steps; print a table and, last, one JSON line."""
    served = read(read_settings().models_file)
    registry = Registry(served.specs, served.default, served.default_flux, "cpu")
    info = RegistryRunner(registry, "CPU").catalogue().models[model]
    bench = bench_of(registry, model, pictures, steps, size)
    bench.params = replace(bench.params, sampler=sampler)
    settings = [
        *(wished(info, bench, one) for one in wish),
        *presets(info.cache)[1:],
        *(Setting(FEWER, f"{n}", PLAIN.make, steps=n) for n in shares(bench.params.steps, FEWER_STEPS)),
    ]
    results = measured(bench, settings, repeats)
    said = f"`{model}`, {sampler or 'its own sampler'}, {bench.params.steps} steps, {pictures} pictures."
    show([said, "", *table(COLUMNS, rows(results)), conditions(machine())])
    print(json.dumps({"benchmark": "wishes", "conditions": said, "settings": {one.name: one.row() for one in results}}))


if __name__ == "__main__":
    typer.run(main)
