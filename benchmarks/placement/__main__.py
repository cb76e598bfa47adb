"""Where DeepCache's compute calls lie: the automatic schedule beside the uniform one. The last line is one JSON object.

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
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import ArrayLike

from benchmarks.cache.measure import grouped, pairs
from benchmarks.placement import pixel
from benchmarks.report import interval, machine, show
from cache import CacheStrategy, DeepCache, NoCache, UNetDenoiser
from cache.cost import deepest_branch
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
    """PSNR to the uncached pictures, dB, one value a picture and in the same order for all.

    decisions: of auto. plain: uniform and without a forecast. fewer: no cache, but as many steps as the time of auto
    allows. These two are empty where they were not measured.
    """

    model: str
    sampler: str
    steps: int
    interval: int
    decisions: str
    auto: list[float]
    uniform: list[float]
    plain: list[float] = field(default_factory=list)
    fewer: list[float] = field(default_factory=list)

    def gain(self, over: str) -> tuple[float, float, float] | None:
        """Mean gain of auto over another, with its 95 % confidence interval."""
        others: list[float] = getattr(self, over)
        gains = [own - other for own, other in zip(self.auto, others, strict=bool(others))]
        return (statistics.mean(gains), *interval(gains)) if gains else None

    def cells(self) -> str:
        found = (self.gain(over) for over in ("uniform", "plain", "fewer"))
        gains = " | ".join("" if gain is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*gain) for gain in found)
        computed = " ".join(str(call) for call, letter in enumerate(self.decisions) if letter == "C")
        means = f"{statistics.mean(self.uniform):.2f} | {statistics.mean(self.auto):.2f}"
        return f"{self.model} | {self.sampler} | {self.steps} | {self.interval} | {means} | {gains} | {computed}"


def near(reference: Sequence[ArrayLike], pictures: Sequence[ArrayLike]) -> list[float]:
    return [psnr(*couple) for couple in zip(reference, pictures, strict=True)]


def row(model: str, sampler: str, steps: int, every: int, draw: Draw, reference: Sequence[ArrayLike]) -> Row:
    pictures, decisions = draw(DeepCache(every))
    even = "".join("R" if call % every else "C" for call in range(len(decisions)))
    others = pictures if decisions == even else draw(DeepCache(every, schedule="uniform"))[0]
    return Row(model, sampler, steps, every, decisions, near(reference, pictures), near(reference, others))


def of_tiny_sd(samplers: Sequence[str], steps: Sequence[int], number: int, size: tuple[int, int]) -> Iterator[Row]:
    model: Any = Registry(SPECS, DEFAULT, DEFAULT_FLUX).get(DEFAULT)
    given: Any = {"width": size[0], "height": size[1], "guidance_scale": 3.0}

    def drawing(sampler: str, count: int) -> Draw:
        def draw(strategy: CacheStrategy) -> tuple[list[ArrayLike], str]:
            pictures: list[ArrayLike] = []
            for prompt, seeds in grouped(pairs(number), 4):
                asked = GenerationParams(prompt=prompt, seeds=tuple(seeds), batch_size=len(seeds), steps=count, **given)
                drawn = model.generate(replace(asked, sampler=sampler), strategy, lambda step: None)
                pictures += [np.asarray(image) for image in drawn.images]
            return pictures, drawn.reports[-1].decisions

        return draw

    branch, costs = deepest_branch(model.denoiser.branch_costs, DeepCache().depth), model.denoiser.branch_costs
    for count in steps:
        for sampler in samplers:
            draw = drawing(sampler, count)
            reference, _ = draw(NoCache())
            for every in INTERVALS:
                found = row(DEFAULT, sampler, count, every, draw, reference)
                if (sampler, count) == ("ddim", 20):  # besides plain reuse and, at no less operations, fewer steps
                    share = 0.0 if branch is None else costs[branch]
                    short = math.ceil(found.decisions.count("C") + share * found.decisions.count("R"))
                    plain, _ = draw(DeepCache(every, schedule="uniform", forecast="none"))
                    fewer, _ = drawing(sampler, short)(NoCache())
                    found = replace(found, plain=near(reference, plain), fewer=near(reference, fewer))
                yield found


def of_pixels() -> Iterator[Row]:
    """Calibrated here and then, on seeds of its own."""
    pipeline = pixel.load()

    def drawn(strategy: CacheStrategy, seeds: Sequence[int], view: UNetDenoiser) -> tuple[Sequence[ArrayLike], str]:
        noise: Any = [torch.Generator().manual_seed(seed) for seed in seeds]
        with strategy.attach(view) as report:
            given = {"batch_size": len(seeds), "num_inference_steps": PIXEL_STEPS, "output_type": "np"}
            pictures = pipeline(generator=noise, **given).images
        return list((pictures * 255).round()), report.decisions

    plain = UNetDenoiser(pipeline.unet)
    pace: Any = {"sampler": ("ddim", "normal"), "steps": PIXEL_STEPS, "intervals": INTERVALS}
    known = calibrate(lambda one: drawn(one, CALIBRATION_SEEDS, plain)[0], plain, pipeline.scheduler, **pace)
    view = plain.ruled(lambda at, every, to: place(known, "ddim", "normal", PIXEL_STEPS, every, to), guided=False)

    def draw(strategy: CacheStrategy) -> tuple[Sequence[ArrayLike], str]:
        return drawn(strategy, TEST_SEEDS, view)

    reference, _ = draw(NoCache())
    for every in INTERVALS:
        yield row("pixel", "ddim", PIXEL_STEPS, every, draw, reference)


def main(
    samplers: Annotated[str, typer.Option(help="Some of euler,ddim,dpmpp_2m,heun.")] = ",".join(SAMPLERS),
    steps: Annotated[str, typer.Option(help="Denoising steps, separated by commas.")] = ",".join(map(str, STEPS)),
    pictures: Annotated[int, typer.Option(min=2, help="Prompts with seeds.")] = 16,
    pixels: Annotated[bool, typer.Option(help="Also the pixel-space UNet, calibrated first.")] = True,
) -> None:
    """Measure the automatic placement of compute calls beside the uniform one."""
    rows = []
    sources = [of_tiny_sd(samplers.split(","), [int(n) for n in steps.split(",")], pictures, (192, 128))]
    for source in [*sources, *([of_pixels()] if pixels else [])]:
        for found in source:
            rows.append(found)
            print(found.cells(), file=sys.stderr)
    columns = "model | sampler | steps | N | uniform | auto | gain | over plain | over fewer | computed"
    show("PSNR to the uncached pictures, dB", columns, (found.cells() for found in rows))
    print(json.dumps({"benchmark": "placement", "machine": machine(), "rows": [asdict(one) for one in rows]}))


if __name__ == "__main__":
    typer.run(main)
