"""Judges what the exported models draw, and writes the report: accuracies and contact sheets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cache import NoCache
from models.base import GenerationParams, ModelSpec, Step
from models.embedded.recipe.grammar import HELD_OUT, PLACES, TIMES, TRIPLES, WEATHERS, Triple
from models.embedded.recipe.judges import TABLES, Judge, Score, verdicts
from models.embedded.recipe.renderer import render
from models.registry import Registry

SEEDS = (1, 2)
LARGE = (768, 512)  # as requests are often
SHOWN = tuple(
    Triple(*names.split())
    for names in (
        "stormy sea twilight",
        "clear island sunset",
        "starry mountains night",
        "snowy forest noon",
        "misty forest twilight",
        "clear hills noon",
        "clear desert dawn",
        "stormy mountains sunset",
        "starry island night",
        "snowy hills dawn",
        "clear sea noon",
        "misty island sunset",
    )
)


def draw(
    registry: Registry, spec: ModelSpec, triples: tuple[Triple, ...], seed: int, size: tuple[int, int] = (192, 128)
) -> list[NDArray[np.uint8]]:
    """One picture a triple, (height, width, 3) bytes, uncached, with the model's own sampler, steps and guidance."""
    model, family = registry.get(spec.name), registry.family(spec.name)
    params = GenerationParams(
        prompt="",
        width=size[0],
        height=size[1],
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


def assess(registry: Registry, judge: Judge, spec: ModelSpec, folder: Path) -> None:
    """Draw every triple with each seed, judge, and write the model's .json and contact sheet to `folder`."""
    pictures = [draw(registry, spec, TRIPLES, seed) for seed in SEEDS]
    sheet(pictures[0], folder / f"{spec.name}.jpg")
    right = verdicts(judge, [one for seed in pictures for one in seed], TRIPLES * len(SEEDS)).float()
    held = torch.tensor([triple in HELD_OUT for triple in TRIPLES]).repeat(len(SEEDS))
    figures = {}
    for name, chosen in (("all", right), ("trained", right[~held]), ("held out", right[held])):
        score = Score(*chosen.mean(0).tolist())
        figures[name] = {"pictures": len(chosen), **asdict(score)}
        print(f"{spec.name}, {name}: {score}", flush=True)
    (folder / f"{spec.name}.json").write_text(json.dumps(figures, indent=1) + "\n")


def enlarge(registry: Registry, spec: ModelSpec, folder: Path) -> None:
    """Write twelve scenes resampled from the native size beside the same ones decoded finely, and how sharp each is."""
    small, fine = (draw(registry, spec, SHOWN, 3, size) for size in ((192, 128), LARGE))
    resampled = [np.asarray(Image.fromarray(one).resize(LARGE, Image.Resampling.LANCZOS)) for one in small]
    rendered = [render(triple, 700_000_000 + i, scale=4) for i, triple in enumerate(SHOWN)]
    width, height = 2 * LARGE[0] // 3, 2 * LARGE[1] // 3
    whole = Image.new("RGB", (4 * width, len(SHOWN) // 2 * height))
    for i, picture in enumerate(one for pair in zip(resampled, fine, strict=True) for one in pair):
        shown = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
        whole.paste(shown, (i % 4 * width, i // 4 * height))
    whole.save(folder / f"{spec.name}-large.jpg", quality=88)
    figures = {"rendered": sharpness(rendered), "resampled": sharpness(resampled), "fine": sharpness(fine)}
    (folder / f"{spec.name}-large.json").write_text(json.dumps(figures, indent=1) + "\n")


def sharpness(pictures: Sequence[NDArray[np.uint8]]) -> float:
    """The root of the mean squared difference between neighbouring pixels, in levels."""
    steps = [np.diff(picture.astype(float), axis=axis) for picture in pictures for axis in (0, 1)]
    return round(float(np.sqrt(np.mean([np.mean(step**2) for step in steps]))), 2)


def report(specs: Sequence[ModelSpec], folder: Path) -> None:
    """Write README.md from what `assess` left in `folder`."""
    lines = [
        "# What the embedded models draw",
        "",
        f"{len(TRIPLES) * len(SEEDS)} pictures a model (every triple, {len(SEEDS)} seeds), uncached, own sampler,",
        "judged by three classifiers that saw only fresh renderings. Held out: the 15 triples that no training saw.",
        "Made by `python -m models.embedded.recipe report`; how the models were trained stands in",
        "[the decision](../decisions/embedded-models.md).",
        "",
        "| model | steps | guidance | pictures | weather | place | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for spec in specs:
        for name, row in json.loads((folder / f"{spec.name}.json").read_text()).items():
            shares = " | ".join(f"{row[judged]:.1%}" for judged in TABLES)
            lines.append(
                f"| {spec.name} | {spec.steps} | {spec.guidance_scale} | {name}, {row['pictures']} | {shares} |"
            )
    lines += [
        "",
        "Larger pictures are decoded by [a finer decoder](../../models/embedded/fine-decoder/README.md).",
        "How sharp twelve of 768×512 are: the root mean square of neighbouring pixels' difference, in levels.",
        "",
        "| model | rendered | resampled from 192×128 | decoded finely |",
        "|---|---|---|---|",
    ]
    for spec in specs:
        row = json.loads((folder / f"{spec.name}-large.json").read_text())
        lines.append(f"| {spec.name} | {row['rendered']} | {row['resampled']} | {row['fine']} |")
    for spec in specs:
        lines += [
            "",
            f"## {spec.name}",
            "",
            "Down: clear, misty and half of snowy, then on the right the rest of snowy, stormy and starry; each in",
            "forest, mountains, desert, sea, hills, island; across: dawn, noon, sunset, twilight, night. White",
            "frames: held out of training.",
            "",
            f"![every triple, drawn by {spec.name}]({spec.name}.jpg)",
            "",
            "Twelve scenes at 768×512: each resampled from 192×128, and on its right decoded finely.",
            "",
            f"![twelve scenes, soft and sharp, by {spec.name}]({spec.name}-large.jpg)",
        ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
