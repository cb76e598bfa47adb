"""PSNR against scikit-image's and against arithmetic done another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from models.tuning.nearness import psnr


def picture(level: int) -> np.ndarray:
    return np.full((4, 4, 3), level, np.uint8)


def test_psnr_is_that_of_scikit_image() -> None:
    generator = np.random.default_rng(0)
    one, other = (generator.integers(0, 256, (16, 24, 3), np.uint8) for _ in range(2))
    assert psnr(one, other) == pytest.approx(peak_signal_noise_ratio(one, other), rel=1e-12)


def test_psnr_of_known_errors() -> None:
    assert psnr(picture(0), picture(255)) == pytest.approx(0.0)
    assert psnr(picture(0), picture(1)) == pytest.approx(48.1308, abs=1e-4)
    one_off = picture(0)
    one_off[1, 2, 0] = 1
    assert psnr(picture(0), picture(0)) == psnr(picture(0), one_off) == pytest.approx(48.1308 + 10 * math.log10(48))
