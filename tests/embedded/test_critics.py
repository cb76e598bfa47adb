"""LPIPS against its definition in numpy, by weights drawn at random."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.cache.perceptual import lpips

SHAPES = ((11, 3, 8), (5, 8, 6), (3, 6, 7), (3, 7, 5), (3, 5, 4))  # size of the window, channels in and out


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {"AlexNet_0": {}}
    for number, (size, narrow, wide) in enumerate(SHAPES):
        kernel, bias = (
            rng.normal(0, (narrow * size * size) ** -0.5, (size, size, narrow, wide)),
            rng.normal(0, 0.1, wide),
        )
        tree["AlexNet_0"][f"Conv_{number}"] = {"kernel": kernel.astype("f4"), "bias": bias.astype("f4")}
        tree[f"NetLinLayer_{number}"] = {"Conv_0": {"kernel": rng.random((1, 1, wide, 1)).astype("f4")}}
    file = tmp_path / "alexnet.ckpt"
    file.write_bytes(pickle.dumps(tree, protocol=3))
    return file, tree


def windows(x: np.ndarray, size: int, stride: int) -> np.ndarray:
    """(height, width, channels, size, size) of (height, width, channels)."""
    return sliding_window_view(x, (size, size), axis=(0, 1))[::stride, ::stride]


def by_definition(tree: dict[str, Any], one: np.ndarray, other: np.ndarray) -> float:
    """Zhang et al. 2018, equation 1: Σ over layers of the mean over places of |w (ŷ − ŷ₀)|²."""
    states = [(picture / 127.5 - 1 - (-0.030, -0.088, -0.188)) / (0.458, 0.448, 0.450) for picture in (one, other)]
    total = 0.0
    for number, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
        layer, size = tree["AlexNet_0"][f"Conv_{number}"], SHAPES[number][0]
        for index, x in enumerate(states):
            if number in (1, 2):
                x = windows(x, 3, 2).max((-1, -2))
            x = windows(np.pad(x, ((padding, padding), (padding, padding), (0, 0))), size, stride)
            states[index] = np.maximum(np.einsum("hwcij,ijco->hwo", x, layer["kernel"]) + layer["bias"], 0)
        a, b = (x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10) for x in states)
        total += ((a - b) ** 2 @ tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].reshape(-1)).mean()
    return float(total)


def test_it_equals_its_definition(weights: tuple[Path, dict[str, Any]]) -> None:
    file, tree = weights
    rng = np.random.default_rng(1)
    one = rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)
    other = np.clip(one + rng.normal(0, 30, one.shape), 0, 255).astype(np.uint8)
    distance = lpips(file)
    assert distance(one, other) == pytest.approx(by_definition(tree, one, other), rel=1e-4)  # float32 beside float64
    assert distance(one, one) == 0


@pytest.mark.parametrize("hidden", [print, np.load])
def test_a_file_that_would_run_something_is_refused(tmp_path: Path, hidden: Callable[..., Any]) -> None:
    file = tmp_path / "alexnet.ckpt"
    file.write_bytes(pickle.dumps({"AlexNet_0": hidden}))
    with pytest.raises(pickle.UnpicklingError, match="has no place"):
        lpips(file)
