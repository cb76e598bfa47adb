"""LPIPS, a distance of two pictures by the features of a network that learned to see (Zhang et al. 2018, AlexNet)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from models.embedded.recipe.alexnet import REMEDY, AlexNet

MISSING = f"LPIPS was not measured: its weights are not installed ({REMEDY})."
Distance = Callable[[ArrayLike, ArrayLike], float]


def lpips(file: Path) -> Distance:
    """The distance of two 8-bit pictures (height, width, 3), 0 for equal ones, by the weights in `file`."""
    network = AlexNet(file)

    def pixels(picture: ArrayLike) -> Tensor:
        return torch.tensor(np.asarray(picture), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1

    def distance(one: ArrayLike, other: ArrayLike) -> float:
        with torch.no_grad():
            return float(network.distance(pixels(one), pixels(other)))

    return distance
