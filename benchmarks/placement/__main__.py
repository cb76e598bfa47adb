"""The command line: measures, prints a table, and one JSON object as the last line.

Every figure is a distance to the uncached picture of the same prompt and seed, and placements are compared at the same
number of compute calls, picture by picture. `auto` takes what the model's placements.json says; no prompt and no seed
is one of those that it was found with.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import ArrayLike

from benchmarks.cache.measure import grouped, pairs
from benchmarks.placement import pixel
from benchmarks.report import ROOT, interval, machine, show
from cache import CacheStrategy, DeepCache, NoCache, UNetDenoiser
from cache.cost import deepest_branch
from cache.schedule import Placement
from models.base import GenerationParams
from models.calibration import calibrate
from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.nearness import psnr
from models.placements import place
from models.registry import Registry

Draw = Callable[[CacheStrategy], tuple[Sequence[ArrayLike], str]]  # pictures, and where calls computed in the last run

SAMPLERS = ("euler", "ddim", "dpmpp_2m", "heun")
STEPS = (10, 20, 30, 50)
INTERVALS = (2, 3, 5)
PIXEL_STEPS = 20
CALIBRATION_SEEDS, TEST_SEEDS = range(16), range(1000, 1032)  # of the pixel-space pictures


@dataclass(frozen=True, slots=True)
class Row:
    """PSNR to the uncached pictures, dB, one value a picture and in the same order for all three."""

    model: str
    sampler: str
    steps: int
    interval: int
    decisions: str  # of auto
    auto: list[float]
    uniform: list[float]
    plain: list[float]  # uniform and without a forecast; empty where it was not measured
    fewer: list[float]  # no cache, but as many steps as the time of auto allows; empty where it was not measured

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.model, self.sampler, self.steps, self.interval, len(self.auto))

    def gain(self, over: str) -> tuple[float, float, float] | None:
        """Mean gain of auto over another, with its 95 % confidence interval."""
        others: list[float] = getattr(self, over)
        gains = [own - other for own, other in zip(self.auto, others, strict=bool(others))]
        return (statistics.mean(gains), *interval(gains)) if gains else None


def tiny_sd(model: Any, number: int, size: tuple[int, int], sampler: str, steps: int) -> Draw:
    params = GenerationParams(
        prompt="", width=size[0], height=size[1], steps=steps, guidance_scale=3.0, sampler=sampler
    )

    def draw(strategy: CacheStrategy) -> tuple[list[ArrayLike], str]:
        pictures: list[ArrayLike] = []
        decisions = ""
        for prompt, seeds in grouped(pairs(number), 4):
            one = replace(params, prompt=prompt, seeds=tuple(seeds), batch_size=len(seeds))
            drawn = model.generate(one, strategy, lambda step: None)
            pictures += [np.asarray(image) for image in drawn.images]
            decisions = drawn.reports[-1].decisions
        return pictures, decisions

    return draw


def row(model: str, sampler: str, steps: int, interval: int, draw: Draw, reference: Sequence[ArrayLike]) -> Row:
    def nearness(strategy: CacheStrategy) -> tuple[list[float], str]:
        pictures, decisions = draw(strategy)
        return [psnr(*couple) for couple in zip(reference, pictures, strict=True)], decisions

    auto, decisions = nearness(DeepCache(interval))
    even = "".join("R" if call % interval else "C" for call in range(len(decisions)))
    uniform = auto if decisions == even else nearness(DeepCache(interval, schedule="uniform"))[0]
    return Row(model, sampler, steps, interval, decisions, auto, uniform, [], [])


def with_baselines(found: Row, draw_at: Callable[[int], Draw], costs: Sequence[float], reference: Any) -> Row:
    """`found` with plain reuse, and with fewer steps at no less than its operations."""
    branch = deepest_branch(costs, DeepCache().depth)
    share = 0.0 if branch is None else costs[branch]
    steps = math.ceil(found.decisions.count("C") + share * found.decisions.count("R"))
    plain, _ = draw_at(found.steps)(DeepCache(found.interval, schedule="uniform", forecast="none"))
    fewer, _ = draw_at(steps)(NoCache())
    near = [[psnr(*couple) for couple in zip(reference, pictures, strict=True)] for pictures in (plain, fewer)]
    return replace(found, plain=near[0], fewer=near[1])


def of_tiny_sd(samplers: Sequence[str], steps: Sequence[int], number: int, size: tuple[int, int]) -> Iterator[Row]:
    model: Any = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get(DEFAULT)
    for count in steps:
        for sampler in samplers:
            draw = tiny_sd(model, number, size, sampler, count)
            reference, _ = draw(NoCache())
            for every in INTERVALS:
                found = row(DEFAULT, sampler, count, every, draw, reference)
                if (sampler, count) == ("ddim", 20):

                    def draw_at(other: int) -> Draw:
                        return tiny_sd(model, number, size, "ddim", other)

                    found = with_baselines(found, draw_at, model.denoiser.branch_costs, reference)
                yield found


def of_pixels() -> Iterator[Row]:
    """Calibrated here and then, on seeds of its own."""
    pipeline = pixel.load()

    def drawn(strategy: CacheStrategy, seeds: Sequence[int], view: UNetDenoiser) -> tuple[Sequence[ArrayLike], str]:
        with strategy.attach(view) as report:
            pictures = pipeline(
                batch_size=len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=PIXEL_STEPS,
                output_type="np",
            ).images
        return list((pictures * 255).round()), report.decisions

    plain = UNetDenoiser(pipeline.unet)
    known = calibrate(
        lambda strategy: drawn(strategy, CALIBRATION_SEEDS, plain)[0],
        plain,
        pipeline.scheduler,
        sampler=("ddim", "normal"),
        steps=PIXEL_STEPS,
        intervals=INTERVALS,
    )

    def rule(timestep: float, interval: int, branch: int | None) -> Placement:
        return place(known, "ddim", "normal", PIXEL_STEPS, interval, branch)

    view = plain.ruled(rule, guided=False)

    def draw(strategy: CacheStrategy) -> tuple[Sequence[ArrayLike], str]:
        return drawn(strategy, TEST_SEEDS, view)

    reference, _ = draw(NoCache())
    for every in INTERVALS:
        yield row("pixel", "ddim", PIXEL_STEPS, every, draw, reference)


def cells(one: Row) -> str:
    found = (one.gain(over) for over in ("uniform", "plain", "fewer"))
    gains = " | ".join("" if gain is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*gain) for gain in found)
    computed = " ".join(str(call) for call, letter in enumerate(one.decisions) if letter == "C")
    means = f"{statistics.mean(one.uniform):.2f} | {statistics.mean(one.auto):.2f}"
    return f"{one.model} | {one.sampler} | {one.steps} | {one.interval} | {means} | {gains} | {computed}"


def main(
    samplers: Annotated[str, typer.Option(help="Some of euler,ddim,dpmpp_2m,heun.")] = ",".join(SAMPLERS),
    steps: Annotated[str, typer.Option(help="Denoising steps, separated by commas.")] = ",".join(map(str, STEPS)),
    pictures: Annotated[int, typer.Option(min=2, help="Prompts with seeds.")] = 16,
    width: int = 192,
    height: int = 128,
    pixels: Annotated[bool, typer.Option(help="Also the pixel-space UNet, calibrated first.")] = True,
    store: Annotated[Path, typer.Option(help="Where rows are added; empty it to begin anew.")] = ROOT
    / "out"
    / "placement.jsonl",
) -> None:
    """Measure the automatic placement of compute calls beside the uniform one."""
    store.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    sources = [of_tiny_sd(samplers.split(","), [int(n) for n in steps.split(",")], pictures, (width, height))]
    for source in [*sources, *([of_pixels()] if pixels else [])]:
        for found in source:
            rows.append(found)
            with store.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(found)) + "\n")
            print(*found.key, found.gain("uniform"), file=sys.stderr)
    columns = "model | sampler | steps | N | uniform | auto | gain | over plain | over fewer | computed"
    show("PSNR to the uncached pictures, dB", columns, map(cells, rows))
    print(json.dumps({"benchmark": "placement", "machine": machine(), "rows": [asdict(one) for one in rows]}))


if __name__ == "__main__":
    typer.run(main)
