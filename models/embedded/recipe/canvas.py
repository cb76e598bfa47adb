"""The canvas that a landscape is painted on: light, haze, soft masks, value noise, skylines, fog."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Light:
    """What the time of day does: three sky stops, the sun's or moon's look and the tint that falls on things."""

    top: tuple[float, float, float]
    middle: tuple[float, float, float]
    horizon: tuple[float, float, float]
    disc: tuple[float, float, float]
    tint: tuple[float, float, float]
    height: tuple[float, float]  # of the disc above the horizon, in parts of the sky
    radius: float
    glow: float


LIGHTS = {
    "dawn": Light(
        (0.50, 0.62, 0.84),
        (0.93, 0.72, 0.80),
        (1.00, 0.88, 0.74),
        (1.0, 0.97, 0.85),
        (0.86, 0.76, 0.82),
        (0.10, 0.26),
        0.042,
        0.55,
    ),
    "noon": Light(
        (0.16, 0.46, 0.90),
        (0.42, 0.70, 0.97),
        (0.80, 0.92, 1.00),
        (1.0, 1.0, 0.94),
        (1.06, 1.06, 1.02),
        (0.74, 0.90),
        0.050,
        0.45,
    ),
    "sunset": Light(
        (0.32, 0.18, 0.42),
        (0.90, 0.36, 0.22),
        (1.00, 0.74, 0.26),
        (1.0, 0.90, 0.52),
        (0.88, 0.58, 0.44),
        (0.03, 0.16),
        0.062,
        0.75,
    ),
    "twilight": Light(
        (0.09, 0.09, 0.30),
        (0.29, 0.22, 0.52),
        (0.66, 0.42, 0.62),
        (0.95, 0.90, 0.98),
        (0.42, 0.36, 0.60),
        (0.45, 0.75),
        0.028,
        0.16,
    ),
    "night": Light(
        (0.015, 0.028, 0.095),
        (0.04, 0.075, 0.20),
        (0.10, 0.17, 0.34),
        (0.95, 0.96, 0.90),
        (0.27, 0.33, 0.50),
        (0.45, 0.85),
        0.048,
        0.22,
    ),
}


@dataclass(slots=True)
class Canvas:
    """A picture in the making, and the dice. scale: pixels a side in place of one of the size that is trained on."""

    pixels: Floats
    horizon: float  # y, pixels
    rng: np.random.Generator
    light: Light
    weather: str
    scale: int = 1
    haze: Floats = field(init=False)
    tint: Floats = field(init=False)

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]

    def paint(self, mask: Floats, colour: Floats | tuple[float, float, float]) -> None:
        """Lay `colour`, (3,) or (h, w, 3), over the picture where `mask` (h, w) says how much."""
        self.pixels += mask[..., None] * (np.asarray(colour, np.float32) - self.pixels)

    def shade(self, colour: tuple[float, float, float], depth: float) -> Floats:
        """`colour` in this light at `depth` (0 near, 1 on the horizon): far things take the colour of the air."""
        lit = np.asarray(colour, np.float32) * self.tint
        reach = {"misty": 0.97, "stormy": 0.62, "snowy": 0.72}.get(self.weather, 0.62)
        floor = 0.20 if self.weather == "misty" else 0.0
        amount = floor + (reach - floor) * depth
        return lit + amount * (self.haze - lit)


@lru_cache(maxsize=256)
def _lerp_matrix(size: int, knots: int, scale: int) -> Floats:
    """(scale × size, knots): smooth-step interpolation of `knots` values to `size` samples, each divided by `scale`."""
    position = np.interp(
        (np.arange(scale * size) + 0.5) / scale - 0.5, np.arange(size), np.linspace(0, knots - 1.001, size)
    )
    left = position.astype(int)
    part = position - left
    part = part * part * (3 - 2 * part)
    matrix = np.zeros((scale * size, knots), np.float32)
    matrix[np.arange(scale * size), left] = 1 - part
    matrix[np.arange(scale * size), left + 1] += part
    return matrix


def line_noise(canvas: Canvas, knots: int, octaves: int, gain: float = 0.5, size: int | None = None) -> Floats:
    """(size,), the canvas's width if not given: value noise around 0, amplitude about 1."""
    scale = canvas.scale
    size = canvas.size[1] if size is None else size
    out = np.zeros(size, np.float32)
    for octave in range(octaves):
        count = knots * 2**octave + 1
        values = canvas.rng.uniform(-1, 1, count).astype(np.float32)
        out += gain**octave * (_lerp_matrix(size // scale, count, scale) @ values)
    return out


def cloud_noise(canvas: Canvas, knots: tuple[int, int], octaves: int) -> Floats:
    """(h, w) value noise around 0, amplitude about 1."""
    scale = canvas.scale
    height, width = canvas.size
    out = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        rows, columns = knots[0] * 2**octave + 1, knots[1] * 2**octave + 1
        grid = canvas.rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
        down, across = _lerp_matrix(height // scale, rows, scale), _lerp_matrix(width // scale, columns, scale)
        out += 0.5**octave * (down @ grid @ across.T)
    return out


@lru_cache(maxsize=16)
def grid(height: int, width: int) -> tuple[Floats, Floats]:
    """Pixel centres: y (h, 1), x (1, w)."""
    return (np.arange(height, dtype=np.float32) + 0.5)[:, None], (np.arange(width, dtype=np.float32) + 0.5)[None, :]


def below(canvas: Canvas, top: Floats) -> Floats:
    """(h, w) mask of what lies under the line `top` (w,), its edge one pixel soft."""
    y, _ = grid(*canvas.size)
    return np.clip(y - top[None, :] + 0.5, 0, 1)


def disc_at(canvas: Canvas, x0: float, y0: float, radius: float) -> Floats:
    y, x = grid(*canvas.size)
    return np.clip(radius - np.hypot(x - x0, y - y0) + 0.5, 0, 1)


def spot_at(canvas: Canvas, x0: float, y0: float) -> tuple[tuple[slice, slice], Floats]:
    """The five pixels a side around that of (x0, y0), at the size that is trained on: where they are, and each one's
    squared distance to the middle."""
    scale, middle = canvas.scale, (canvas.scale - 1) / 2
    i, j = scale * int(y0), scale * int(x0)
    window = np.s_[max(i - 2 * scale, 0) : i + 3 * scale, max(j - 2 * scale, 0) : j + 3 * scale]
    yy, xx = np.mgrid[window]
    return window, (yy - i - middle) ** 2 + (xx - j - middle) ** 2


def ridge(canvas: Canvas, base: float, rise: float, knots: int, octaves: int, gain: float, sharp: bool) -> Floats:
    """(w,) y of a skyline: `base` and `rise` in parts of the height."""
    height = canvas.size[0]
    noise = line_noise(canvas, knots, octaves, gain)
    if sharp:
        noise = 1.1 - 2.2 * np.abs(noise)
    return height * base - height * rise * noise


def ground_colour(canvas: Canvas, colour: tuple[float, float, float], depth: float) -> Floats:
    if canvas.weather == "snowy":
        colour = tuple(0.14 * c + 0.86 * w for c, w in zip(colour, (0.92, 0.95, 1.0), strict=True))  # type: ignore[assignment]
    return canvas.shade(colour, depth)


def fog(canvas: Canvas, y0: float, thickness: float, strength: float) -> None:
    """A drifting horizontal band round the line y0 (pixels)."""
    y, _ = grid(*canvas.size)
    drift = line_noise(canvas, 3, 2)[None, :] * thickness * 0.6
    band = np.exp(-(((y - y0 - drift) / thickness) ** 2)) * strength
    canvas.paint(band.astype(np.float32), canvas.haze)
