"""Judges what the exported models draw, and writes the report: accuracies and contact sheets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cache import NoCache
from models.base import GenerationParams, ModelSpec, Step
from models.embedded.recipe.grammar import HELD_OUT, PLACES, TIMES, TRIPLES, WEATHERS, Triple
from models.embedded.recipe.judges import Judge, Score, verdicts
from models.registry import Registry

SEEDS = (1, 2)
BATCH = 10


def draw(registry: Registry, spec: ModelSpec, triples: tuple[Triple, ...], seed: int) -> list[NDArray[np.uint8]]:
    """One picture a triple, (128, 192, 3) bytes, uncached, with the model's own sampler, steps and guidance."""
    model, family = registry.get(spec.name), registry.family(spec.name)
    params = GenerationParams(
        prompt="",
        width=192,
        height=128,
        steps=spec.steps or family.steps,
        guidance_scale=family.guidance_scale if spec.guidance_scale is None else spec.guidance_scale,
    )

    def silent(step: Step) -> None:
        return None

    pictures = []
    for i, triple in enumerate(triples):
        made = model.generate(replace(params, prompt=str(triple), seeds=(1000 * seed + i,)), NoCache(), silent)
        pictures.append(np.asarray(made.images[0]))
        if (i + 1) % 30 == 0:
            print(f"{spec.name}, seed {seed}: {i + 1} of {len(triples)} pictures", flush=True)
    return pictures


def sheet(pictures: list[NDArray[np.uint8]], path: Path) -> None:
    """All triples, one row a weather and place, one column a time; those held out of training framed in white."""
    rows, columns = len(WEATHERS) * len(PLACES) // 2, 2 * len(TIMES)
    height, width = pictures[0].shape[:2]
    whole = Image.new("RGB", (columns * width, rows * height))
    pen = ImageDraw.Draw(whole)
    for i, (picture, triple) in enumerate(zip(pictures, TRIPLES, strict=True)):
        row, column = divmod(i, len(TIMES))
        x, y = (column + len(TIMES) * (row // rows)) * width, (row % rows) * height
        whole.paste(Image.fromarray(picture), (x, y))
        if triple in HELD_OUT:
            pen.rectangle((x + 1, y + 1, x + width - 2, y + height - 2), outline="white", width=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.resize((columns * width * 3 // 4, rows * height * 3 // 4), Image.Resampling.LANCZOS).save(path, quality=88)


def report(registry: Registry, judge: Judge, specs: tuple[ModelSpec, ...], folder: Path) -> None:
    """Draw every triple with each seed, judge, and write README.md, report.json and a sheet a model to `folder`."""
    held = torch.tensor([triple in HELD_OUT for triple in TRIPLES]).repeat(len(SEEDS))
    lines = [
        "# What the embedded models draw",
        "",
        f"{len(TRIPLES) * len(SEEDS)} pictures a model (every triple, seeds {SEEDS}), uncached, own sampler, judged by "
        "three classifiers that saw only fresh renderings. Held out: the 15 triples that no training saw.",
        "Made by `python -m models.embedded.recipe judges report`.",
        "",
        "| model | steps | guidance | pictures | weather | place | time |",
        "|---|---|---|---|---|---|---|",
    ]
    figures = {}
    for spec in specs:
        pictures = [draw(registry, spec, TRIPLES, seed) for seed in SEEDS]
        sheet(pictures[0], folder / f"{spec.name}.jpg")
        right = verdicts(judge, [one for seed in pictures for one in seed], TRIPLES * len(SEEDS)).float()
        for name, chosen in (("all", right), ("trained", right[~held]), ("held out", right[held])):
            score = Score(*chosen.mean(0).tolist())
            figures[f"{spec.name} {name}"] = {"weather": score.weather, "place": score.place, "time": score.time}
            print(f"{spec.name}, {name}: {score}", flush=True)
            lines.append(
                f"| {spec.name} | {spec.steps} | {spec.guidance_scale} | {name}, {len(chosen)} "
                f"| {score.weather:.1%} | {score.place:.1%} | {score.time:.1%} |"
            )
    for spec in specs:
        lines += ["", f"## {spec.name}", "", "Rows: weather × place, columns: dawn, noon, sunset, twilight, night; "]
        lines[-1] += "white frames: held out."
        lines += ["", f"![every triple, drawn by {spec.name}]({spec.name}.jpg)"]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    (folder / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
