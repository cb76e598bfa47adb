"""Rendered pictures on disk, and the batches that the trainings draw from them."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from models.embedded.recipe.grammar import TRAINED, Triple
from models.embedded.recipe.renderer import render

# (width, height) in pixels → share of the pictures. The request's aspect picks one of these.
SIZES: dict[tuple[int, int], float] = {(192, 128): 0.7, (128, 128): 0.15, (128, 192): 0.15}


def _chunk(job: tuple[list[Triple], int, tuple[int, int]]) -> NDArray[np.uint8]:
    triples, first_seed, (width, height) = job
    return np.stack([render(triple, first_seed + i, width, height) for i, triple in enumerate(triples)])


def render_all(folder: Path, count: int, seed: int = 1) -> None:
    """Write `count` pictures as one .npy and one .json of triples a size. Held-out triples are never drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(seed)
    for i, (size, share) in enumerate(SIZES.items()):
        path = picture_path(folder, size)
        if path.exists():
            continue
        number = int(count * share)
        triples = [TRAINED[j % len(TRAINED)] for j in range(number)]
        rng.shuffle(triples)
        starts = range(0, number, 100)
        jobs = [(triples[j : j + 100], (i + 1) * 10_000_000 + j, size) for j in starts]
        with ProcessPoolExecutor(2) as pool:
            pictures = np.concatenate(list(pool.map(_chunk, jobs)))
        path.with_suffix(".json").write_text(json.dumps([astuple(triple) for triple in triples]))
        np.save(path, pictures)
        print(f"rendered {number} pictures of {size[0]}×{size[1]}", flush=True)


def picture_path(folder: Path, size: tuple[int, int]) -> Path:
    return folder / f"pictures-{size[0]}x{size[1]}.npy"


def load(folder: Path, size: tuple[int, int]) -> tuple[NDArray[np.uint8], list[Triple]]:
    """Pictures (n, height, width, 3), mapped from disk, and their triples."""
    path = picture_path(folder, size)
    triples = [Triple(*names) for names in json.loads(path.with_suffix(".json").read_text())]
    return np.load(path, mmap_mode="r"), triples
