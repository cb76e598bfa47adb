"""How far a picture is from the uncached one, and how sure a mean over pictures is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.nearness import PEAK

_WINDOW = 11  # samples a side
_SIGMA = 1.5  # samples
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

_RESAMPLES = 10_000
_COVERAGE = 0.95


def ssim(reference: ArrayLike, picture: ArrayLike) -> float:
    """Mean structural similarity of the lumas of two 8-bit pictures (height, width, 3), each side 11 pixels or more.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", equations 13 to 17:
    Gaussian window of 11 × 11 with σ = 1.5, K₁ = 0.01, K₂ = 0.03, windows that lie whole in the picture.
    """
    x, y = (np.asarray(image, float) @ np.asarray(_LUMA) for image in (reference, picture))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x = _blurred(x * x) - mean_x**2
    variance_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float((above / below).mean())


def _blurred(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted means of all whole windows; the window is separable."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for _ in range(2):
        rows = len(plane) - _WINDOW + 1
        plane = sum(weight * plane[i : i + rows] for i, weight in enumerate(weights)).T
    return plane


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean: percentile bootstrap over the pictures, with a fixed seed.

    Given the differences of two settings on the same pictures, it is that of their mean difference.
    """
    sample = np.asarray(values, float)
    drawn = np.random.default_rng(0).integers(len(sample), size=(_RESAMPLES, len(sample)))
    tail = (1 - _COVERAGE) / 2
    low, high = np.quantile(sample[drawn].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
