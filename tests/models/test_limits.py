"""Sizes and words that a small model does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models import limits
from models.base import ModelSpec

TINY = ModelSpec(
    name="tiny",
    family="sd",
    source=Path("nowhere"),
    render_sizes=((192, 128), (128, 128), (128, 192)),
    vocabulary=frozenset({"a", "misty", "forest", "at", "twilight"}),
)
ANY = ModelSpec(name="any", family="sd", source=Path("nowhere"))


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ((768, 512), (192, 128)),
        ((512, 512), (128, 128)),
        ((512, 768), (128, 192)),
        ((2048, 64), (192, 128)),
        ((640, 512), (192, 128)),  # 1.25 is nearer to 1.5 than to 1 by its logarithm: 1.2 against 1.25
        ((600, 512), (128, 128)),
    ],
)
def test_the_size_of_the_nearest_aspect_is_drawn(asked: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert limits.render_size(TINY, *asked) == drawn
    assert limits.render_size(ANY, *asked) == asked


def test_fitting_cuts_evenly_and_distorts_nothing() -> None:
    """A disc in the middle stays a disc in the middle, and the gradient loses the same share at both ends."""
    y, x = np.mgrid[0:128, 0:192]
    disc = (np.hypot(x - 95.5, y - 63.5) < 40).astype(np.uint8) * 255
    ramp = (x / 191 * 255).astype(np.uint8)
    picture = Image.fromarray(np.dstack([disc, ramp, np.zeros_like(disc)]))
    fitted = np.asarray(limits.fit(picture, 512, 512)).astype(float)
    assert fitted.shape == (512, 512, 3)
    inside = fitted[..., 0] > 127
    assert np.ptp(np.nonzero(inside.any(0))[0]) == pytest.approx(np.ptp(np.nonzero(inside.any(1))[0]), abs=2)
    assert np.nonzero(inside.any(0))[0].mean() == pytest.approx(255.5, abs=1)
    left, right = fitted[256, 0, 1], fitted[256, -1, 1]
    assert left == pytest.approx(255 - right, abs=3)
    assert left == pytest.approx(255 / 6, abs=5)  # a third of the width is cut, a sixth on either side


def test_fitting_leaves_a_picture_of_the_right_size_alone() -> None:
    picture = Image.new("RGB", (192, 128), "teal")
    assert limits.fit(picture, 192, 128) is picture


def test_resampling_and_unknown_words_are_said() -> None:
    prompt = "A misty Forest, at twilight: with 2 wolves, wolves & a cat"
    assert limits.warnings(TINY, prompt, 768, 512) == [
        "tiny draws at 192×128; the picture was resampled to 768×512.",
        "tiny was not trained on these words of the prompt: with, wolves, cat.",
    ]
    assert limits.warnings(TINY, "a misty forest at twilight", 192, 128) == []
    assert limits.warnings(ANY, prompt, 768, 512) == []


def test_a_long_prompt_is_answered_with_a_short_sentence() -> None:
    words = " ".join(f"{'x' * 50}{chr(ord('a') + i)}{chr(ord('a') + j)}" for i in range(10) for j in range(10))
    (sentence,) = limits.warnings(TINY, words, 192, 128)
    assert len(sentence) < 500
    assert sentence.endswith("and 90 more.")
