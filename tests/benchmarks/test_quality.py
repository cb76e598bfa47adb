"""SSIM and confidence intervals against arithmetic done another way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.cache.measure import interval, ssim


def looped_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 as written: for each window the weighted moments, in two dimensions, with plain floats."""
    weights = {(i, j): math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for i in range(11) for j in range(11)}
    total = sum(weights.values())
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a = {at: float(x[top + at[0], left + at[1]]) for at in weights}
            b = {at: float(y[top + at[0], left + at[1]]) for at in weights}
            mean_a = sum(w * a[at] for at, w in weights.items()) / total
            mean_b = sum(w * b[at] for at, w in weights.items()) / total
            var_a = sum(w * (a[at] - mean_a) ** 2 for at, w in weights.items()) / total
            var_b = sum(w * (b[at] - mean_b) ** 2 for at, w in weights.items()) / total
            both = sum(w * (a[at] - mean_a) * (b[at] - mean_b) for at, w in weights.items()) / total
            structure = (2 * both + c2) / (var_a + var_b + c2)
            values.append((2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * structure)
    return sum(values) / len(values)


def test_ssim_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (14, 17, 3)).astype(np.uint8)
    second = np.clip(first + rng.normal(0, 25, first.shape), 0, 255).astype(np.uint8)
    lumas = [image @ np.array([0.299, 0.587, 0.114]) for image in (first, second)]
    assert ssim(first, second) == pytest.approx(looped_ssim(*lumas), abs=1e-9)
    assert 0.5 < ssim(first, second) < 0.999
    assert ssim(first, first) == pytest.approx(1.0)


def test_the_interval_is_that_of_the_normal_approximation_where_that_holds() -> None:
    values = np.random.default_rng(1).normal(30, 4, 400)
    low, high = interval(list(values))
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert interval([2.0] * 5) == (2.0, 2.0)
