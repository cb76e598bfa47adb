"""LPIPS against its definition in numpy, and the critics that read its network, by weights drawn at random."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.cache.perceptual import lpips
from models.embedded import FOLDER
from models.embedded.recipe import critics, data, fine
from models.embedded.recipe.alexnet import AlexNet

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


@pytest.mark.parametrize("kind", ["edges", "shapes"])
def test_a_critic_learns_to_tell_noise_from_its_blur(weights: tuple[Path, dict[str, Any]], kind: str) -> None:
    torch.manual_seed(0)
    critic = critics.EdgeCritic() if kind == "edges" else critics.ShapeCritic(AlexNet(weights[0]))
    optimizer = torch.optim.AdamW(critic.parameters(), lr=2e-3)

    def dealt() -> tuple[torch.Tensor, torch.Tensor]:
        true = torch.rand(4, 3, 96, 96)
        return true, torch.nn.functional.avg_pool2d(true, 5, 1, 2)

    for _ in range(30):
        critics.learn(critic, optimizer, *dealt())
    true, blurred = dealt()
    assert critics.doubt(critic, blurred) > critics.doubt(critic, true) + 0.5


def test_a_step_of_the_fine_decoder_teaches_it_and_both_critics(
    weights: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine, "CROP", 32)
    rng = np.random.default_rng(0)
    vae, model = fine.build(FOLDER)
    seeing = AlexNet(weights[0])
    before = [weight.clone() for weight in seeing.parameters()]
    large = {(w, h): rng.integers(0, 256, (2, 4 * h, 4 * w, 3), dtype=np.uint8) for w, h in data.SIZES}
    small = {size: torch.tensor(one[:, ::4, ::4].copy()).permute(0, 3, 1, 2) for size, one in large.items()}
    drawn = {(w, h): [torch.randn(2, 8, h // 8, w // 8), small[w, h]] for w, h in data.SIZES}
    pairs = fine.Pairs(large, {size: dict.fromkeys(fine.KINDS, one) for size, one in small.items()}, [drawn])

    def shown(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, true = pairs.deal(rng, count)
        with torch.no_grad():
            return vae.encode(pictures * 2 - 1).latent_dist.mean, true

    def made_of(latents: torch.Tensor) -> torch.Tensor:
        return model.decode(latents).sample / 2 + 0.5

    criticised = fine.Criticised(pairs, shown, made_of, seeing)
    first = [next(critic.parameters()) for critic, _, _ in criticised.critics]
    begun = [weight.clone() for weight in first]
    criticised(0).backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert len(first) == 2
    assert not any(map(torch.equal, begun, first))
    assert all(map(torch.equal, before, seeing.parameters()))
