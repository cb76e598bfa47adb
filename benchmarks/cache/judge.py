"""Does a cache change what a picture shows? The embedded models' own classifiers, which saw no generated picture."""

from __future__ import annotations

from pathlib import Path

import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from models.embedded import FOLDER
from models.embedded.recipe.autoencoder import to_tensor
from models.embedded.recipe.judges import Judge

WEIGHTS = FOLDER / "judges.safetensors"


def agreement(reference: NDArray, pictures: NDArray, weights: Path = WEIGHTS) -> float | None:
    """Share of pictures judged to show the same weather, place and time as their references.

    Both (pictures, height, width, 3) in bytes. None without the judge's weights.
    """
    if not weights.exists():
        return None
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    judge.eval()
    with torch.no_grad():
        seen = [
            torch.stack([head.argmax(-1) for head in judge(to_tensor(images).cpu())])  # (3, pictures)
            for images in (reference, pictures)
        ]
    return float((seen[0] == seen[1]).all(0).float().mean())
