"""Two pictures held against each other."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image


def psnr(first: bytes, second: bytes) -> float:
    """Peak signal-to-noise ratio in dB over all 8-bit RGB values of two encoded pictures; infinite when equal.

    Raises ValueError where they are not of one size.
    """
    error = float(np.mean((_pixels(first) - _pixels(second)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def difference(first: bytes, second: bytes, amplify: int) -> Image.Image:
    """`amplify` times the absolute difference of each colour value, on black; what exceeds 255 is 255."""
    distance = np.abs(_pixels(first) - _pixels(second)) * amplify
    return Image.fromarray(np.clip(distance, 0, 255).astype(np.uint8))


def thumbnail(picture: bytes, side: int = 400) -> bytes:
    """A JPEG of at most `side` pixels a side."""
    with Image.open(io.BytesIO(picture)) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return out.getvalue()


def _pixels(picture: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(height, width, 3), 0 … 255."""
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)
