"""Landscapes drawn from a triple of the grammar and a seed: the only pictures that the embedded models ever saw.

Everything is a soft-edged layer painted far to near over a sky: ridges with aerial perspective, conifers as saw-toothed
silhouettes, water with ripples and a glitter path, then what the weather adds. Arrays are (height, width, 3) floats in
0…1, y down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from models.embedded.recipe.grammar import Triple

Floats = NDArray[np.float32]


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
    "dawn": Light((0.50, 0.62, 0.84), (0.93, 0.72, 0.80), (1.00, 0.88, 0.74), (1.0, 0.97, 0.85), (0.86, 0.76, 0.82),
                  (0.10, 0.26), 0.042, 0.55),
    "noon": Light((0.16, 0.46, 0.90), (0.42, 0.70, 0.97), (0.80, 0.92, 1.00), (1.0, 1.0, 0.94), (1.06, 1.06, 1.02),
                  (0.74, 0.90), 0.050, 0.45),
    "sunset": Light((0.32, 0.18, 0.42), (0.90, 0.36, 0.22), (1.00, 0.74, 0.26), (1.0, 0.90, 0.52), (0.88, 0.58, 0.44),
                    (0.03, 0.16), 0.062, 0.75),
    "twilight": Light((0.09, 0.09, 0.30), (0.29, 0.22, 0.52), (0.66, 0.42, 0.62), (0.95, 0.90, 0.98), (0.42, 0.36, 0.60),
                      (0.45, 0.75), 0.028, 0.16),
    "night": Light((0.015, 0.028, 0.095), (0.04, 0.075, 0.20), (0.10, 0.17, 0.34), (0.95, 0.96, 0.90), (0.27, 0.33, 0.50),
                   (0.45, 0.85), 0.048, 0.22),
}  # fmt: skip


@dataclass(slots=True)
class Canvas:
    """A picture in the making, and the dice."""

    pixels: Floats
    horizon: float  # y, pixels
    rng: np.random.Generator
    light: Light
    weather: str
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
        floor = {"misty": 0.20}.get(self.weather, 0.0)
        amount = floor + (reach - floor) * depth
        return lit + amount * (self.haze - lit)


@lru_cache(maxsize=256)
def _lerp_matrix(size: int, knots: int) -> Floats:
    """(size, knots): smooth-step interpolation of `knots` values to `size` samples."""
    position = np.linspace(0, knots - 1.001, size)
    left = position.astype(int)
    part = position - left
    part = part * part * (3 - 2 * part)
    matrix = np.zeros((size, knots), np.float32)
    matrix[np.arange(size), left] = 1 - part
    matrix[np.arange(size), left + 1] += part
    return matrix


def line_noise(rng: np.random.Generator, size: int, knots: int, octaves: int, gain: float = 0.5) -> Floats:
    """(size,) value noise around 0, amplitude about 1."""
    out = np.zeros(size, np.float32)
    for octave in range(octaves):
        count = knots * 2**octave + 1
        out += gain**octave * (_lerp_matrix(size, count) @ rng.uniform(-1, 1, count).astype(np.float32))
    return out


def cloud_noise(rng: np.random.Generator, shape: tuple[int, int], knots: tuple[int, int], octaves: int) -> Floats:
    """(h, w) value noise around 0, amplitude about 1."""
    out = np.zeros(shape, np.float32)
    for octave in range(octaves):
        rows, columns = knots[0] * 2**octave + 1, knots[1] * 2**octave + 1
        grid = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
        out += 0.5**octave * (_lerp_matrix(shape[0], rows) @ grid @ _lerp_matrix(shape[1], columns).T)
    return out


@lru_cache(maxsize=16)
def _grid(height: int, width: int) -> tuple[Floats, Floats]:
    """Pixel centres: y (h, 1), x (1, w)."""
    return (np.arange(height, dtype=np.float32) + 0.5)[:, None], (np.arange(width, dtype=np.float32) + 0.5)[None, :]


def _below(canvas: Canvas, top: Floats) -> Floats:
    """(h, w) mask of what lies under the line `top` (w,), its edge one pixel soft."""
    y, _ = _grid(*canvas.size)
    return np.clip(y - top[None, :] + 0.5, 0, 1)


def _disc(canvas: Canvas, x0: float, y0: float, radius: float) -> Floats:
    y, x = _grid(*canvas.size)
    return np.clip(radius - np.hypot(x - x0, y - y0) + 0.5, 0, 1)


# --- sky -------------------------------------------------------------------------------------------------------------


def _sky(canvas: Canvas) -> tuple[float, float]:
    """Gradient, disc and clouds. Returns where the disc stands (x, y), pixels."""
    height, width = canvas.size
    light, rng = canvas.light, canvas.rng
    y, x = _grid(height, width)
    t = np.clip(y / canvas.horizon, 0, 1)
    stops = np.asarray([light.top, light.middle, light.horizon], np.float32)
    sky = np.stack([np.interp(t[:, 0], [0, 0.62, 1.0], stops[:, c]) for c in range(3)], -1).astype(np.float32)
    if canvas.weather == "starry":
        dark = np.asarray([0.02, 0.03, 0.12], np.float32)
        keep = 0.42 + 0.48 * t
        sky = sky * keep + dark * (1 - keep)
    elif canvas.weather == "misty":
        sky += 0.45 * (canvas.haze - sky)
    elif canvas.weather == "snowy":
        grey = sky.mean(-1, keepdims=True) * 0.75 + 0.20 * max(light.tint)
        sky += 0.50 * (grey - sky)
    elif canvas.weather == "stormy":
        grey = sky.mean(-1, keepdims=True)
        sky = (0.45 * sky + 0.25 * grey) * (0.62 + 0.30 * t**2)
    canvas.pixels[:] = sky[:, None, :]

    x0 = float(rng.uniform(0.15, 0.85) * width)
    y0 = float(canvas.horizon * (1 - rng.uniform(*light.height)))
    distance = np.hypot(x - x0, y - y0) / height
    strength = {"misty": 0.55, "snowy": 0.40, "stormy": 0.0, "starry": 0.8}.get(canvas.weather, 1.0)
    glow = strength * light.glow * (0.6 * np.exp(-((distance / 0.16) ** 2)) + 0.4 * np.exp(-distance / 0.30))
    canvas.paint(glow.astype(np.float32), light.disc)
    if canvas.weather == "starry":
        _stars(canvas)
    if strength:
        canvas.paint(_disc(canvas, x0, y0, light.radius * height) * min(1.0, strength + 0.25), light.disc)
        if canvas.light is LIGHTS["twilight"] or canvas.light is LIGHTS["night"]:
            bite = _disc(canvas, x0 - 0.4 * light.radius * height, y0 - 0.2 * light.radius * height,
                         0.85 * light.radius * height)  # fmt: skip
            if rng.random() < 0.5:
                t0 = min(max(y0 / canvas.horizon, 0), 1)
                canvas.paint(bite * _disc(canvas, x0, y0, light.radius * height), sky[int(t0 * canvas.horizon)])
    _clouds(canvas)
    return x0, y0


def _stars(canvas: Canvas) -> None:
    """Points of three sizes over the whole sky and a band of many faint ones."""
    height, width = canvas.size
    rng = canvas.rng
    layer = np.zeros((height, width), np.float32)
    slope, offset = rng.uniform(-0.5, 0.5), rng.uniform(0.2, 0.6) * canvas.horizon
    y, x = _grid(height, width)
    band = np.exp(-(((y - offset - slope * (x - width / 2)) / (0.16 * height)) ** 2))
    canvas.paint((0.16 * band * (1 + 0.5 * cloud_noise(rng, canvas.size, (4, 6), 2))).clip(0, 1), (0.62, 0.64, 0.85))
    count = int(0.0065 * width * canvas.horizon)
    xs, ys = rng.uniform(1, width - 2, count), rng.uniform(1, canvas.horizon, count)
    for x0, y0, size in zip(xs, ys, rng.choice([0.9, 1.2, 1.6], count, p=[0.5, 0.35, 0.15]), strict=True):
        i, j = int(y0), int(x0)
        window = np.s_[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3]
        yy, xx = np.mgrid[window]
        spot = np.exp(-((yy - i) ** 2 + (xx - j) ** 2) / (0.55 * size**2)) * min(1.0, 0.55 + 0.35 * size)
        layer[window] = np.maximum(layer[window], spot)
    fade = np.clip((canvas.horizon - y) / (0.12 * canvas.horizon), 0, 1)
    canvas.paint(layer * fade, (0.98, 0.98, 1.0))


def _clouds(canvas: Canvas) -> None:
    rng, light = canvas.rng, canvas.light
    y, _ = _grid(*canvas.size)
    up = np.clip(1 - y / canvas.horizon, 0, 1)
    if canvas.weather == "stormy":
        field_ = cloud_noise(rng, canvas.size, (5, 4), 4)
        mask = np.clip(0.55 + 0.9 * field_ + 0.9 * (up - 0.45), 0, 1) * np.clip(3 * up + 0.1, 0, 1)
        lit = np.clip(0.5 + 0.8 * cloud_noise(rng, canvas.size, (6, 5), 3), 0, 1)[..., None]
        base = np.asarray(light.middle, np.float32) * 0.32 + 0.10 * max(light.tint) + 0.01
        canvas.paint((0.92 * mask).astype(np.float32), base * (0.50 + 0.75 * lit))
        return
    if canvas.weather in ("misty", "starry"):
        return
    if canvas.weather == "snowy":
        mask = np.clip(0.35 + 0.8 * cloud_noise(rng, canvas.size, (4, 4), 3), 0, 1) * 0.55
        grey = np.asarray(light.horizon, np.float32) * 0.45 + 0.42 * np.asarray(light.tint, np.float32)
        canvas.paint((mask * np.clip(3 * up, 0, 1)).astype(np.float32), grey.clip(0, 0.95))
        return
    mask = np.clip(1.7 * cloud_noise(rng, canvas.size, (9, 3), 3) - rng.uniform(0.6, 1.3), 0, 1)
    mask = mask * np.clip(4 * up, 0, 1) * np.clip(3 * (1 - up), 0, 1)
    white = 0.55 * np.asarray(light.horizon, np.float32) + 0.5 * np.asarray(light.disc, np.float32) * max(light.tint)
    canvas.paint((0.75 * mask).astype(np.float32), white.clip(0, 1))


# --- land ------------------------------------------------------------------------------------------------------------


def _ridge(canvas: Canvas, base: float, rise: float, knots: int, octaves: int, gain: float, sharp: bool) -> Floats:
    """(w,) y of a skyline: `base` and `rise` in parts of the height."""
    height, width = canvas.size
    noise = line_noise(canvas.rng, width, knots, octaves, gain)
    if sharp:
        noise = 1.1 - 2.2 * np.abs(noise)
    return height * base - height * rise * noise


def _conifers(canvas: Canvas, feet: Floats, count: int, size: float, colour: Floats, snow: bool) -> None:
    """Trees whose trunks stand on the line `feet` (w,); `size` in parts of the height."""
    height, width = canvas.size
    rng = canvas.rng
    mask = np.zeros((height, width), np.float32)
    white = np.zeros((height, width), np.float32)
    for x0 in np.sort(rng.uniform(-0.02 * width, 1.02 * width, count)):
        tall = height * size * rng.uniform(0.55, 1.15)
        half = tall * rng.uniform(0.20, 0.27)
        foot = float(feet[int(np.clip(x0, 0, width - 1))]) + 1
        top, left = int(max(foot - tall - 1, 0)), int(max(x0 - half - 2, 0))
        window = np.s_[top : min(int(foot) + 1, height), left : min(int(x0 + half) + 3, width)]
        yy, xx = np.mgrid[window].astype(np.float32) + 0.5
        if not yy.size:
            continue
        t = np.clip((yy - (foot - tall)) / tall, 0, 1)
        tiers = max(3.0, tall / 5.5)
        saw = (t * tiers) % 1.0
        spread = half * (0.10 + 0.90 * t) * (0.45 + 0.55 * saw)
        tree = np.clip(spread - np.abs(xx - x0) + 0.5, 0, 1) * np.clip(yy - (foot - tall) + 0.5, 0, 1)
        mask[window] = np.maximum(mask[window], tree)
        if snow:
            white[window] = np.maximum(white[window] * (1 - tree), tree * np.clip(1.6 - 3.2 * saw, 0, 1))
    canvas.paint(mask, colour)
    if snow:
        canvas.paint(white * 0.75, np.asarray((0.93, 0.95, 1.0), np.float32) * canvas.tint)


def _ground_colour(canvas: Canvas, colour: tuple[float, float, float], depth: float) -> Floats:
    if canvas.weather == "snowy":
        colour = tuple(0.14 * c + 0.86 * w for c, w in zip(colour, (0.92, 0.95, 1.0), strict=True))  # type: ignore[assignment]
    return canvas.shade(colour, depth)


def _fog(canvas: Canvas, y0: float, thickness: float, strength: float) -> None:
    """A drifting horizontal band round the line y0 (pixels)."""
    y, _ = _grid(*canvas.size)
    drift = line_noise(canvas.rng, canvas.size[1], 3, 2)[None, :] * thickness * 0.6
    band = np.exp(-(((y - y0 - drift) / thickness) ** 2)) * strength
    canvas.paint(band.astype(np.float32), canvas.haze)


def _forest(canvas: Canvas) -> None:
    height, width = canvas.size
    snow = canvas.weather == "snowy"
    if canvas.rng.random() < 0.7:
        far = _ridge(canvas, canvas.horizon / height - 0.02, 0.05, 3, 4, 0.5, False)
        canvas.paint(_below(canvas, far), canvas.shade((0.24, 0.36, 0.36), 0.85))
    for depth, base, size, density in ((0.72, 0.60, 0.16, 0.30), (0.45, 0.70, 0.26, 0.17), (0.20, 0.82, 0.38, 0.085)):
        feet = _ridge(canvas, base + 0.02, 0.02, 4, 3, 0.5, False)
        colour = canvas.shade((0.10, 0.26, 0.17), depth)
        _conifers(canvas, feet, int(density * width), size, colour, snow)
        canvas.paint(_below(canvas, feet), _ground_colour(canvas, (0.13, 0.28, 0.17), depth))
        if canvas.weather == "misty":
            _fog(canvas, height * (base + 0.01), height * 0.06, 0.75)
    feet = _ridge(canvas, 1.0, 0.02, 4, 2, 0.5, False)
    _conifers(canvas, feet, int(canvas.rng.integers(3, 7)), 0.62, canvas.shade((0.05, 0.15, 0.10), 0.0), snow)


def _mountains(canvas: Canvas) -> None:
    height, width = canvas.size
    base = canvas.horizon / height
    y, _ = _grid(height, width)
    for depth, lift, rise, knots in ((0.85, 0.12, 0.13, 4), (0.58, 0.10, 0.17, 3), (0.30, -0.04, 0.14, 3)):
        top = _ridge(canvas, base - lift, rise, knots, 5, 0.38, True)
        mask = _below(canvas, top)
        canvas.paint(mask, canvas.shade((0.34, 0.36, 0.44), depth))
        slope = np.convolve(np.gradient(top), np.full(9, 1 / 9), mode="same")[None, :]
        side = np.clip(0.5 + 0.9 * slope, 0, 1)
        shadow = mask * side * np.clip(1 - (y - top) / (0.35 * height), 0, 1)
        canvas.paint((0.42 * shadow).astype(np.float32), canvas.shade((0.14, 0.15, 0.22), depth))
        line = height * (base - 0.02) if canvas.weather == "snowy" else height * (base - 0.10 - 0.03 * depth)
        ragged = line_noise(canvas.rng, width, 12, 3)[None, :] * 0.035 * height
        caps = mask * np.clip((line + ragged - y) / 2.5, 0, 1) * (1 - 0.5 * side)
        canvas.paint(caps.astype(np.float32), canvas.shade((0.95, 0.96, 1.0), depth * 0.7))
        if canvas.weather == "misty":
            _fog(canvas, height * (base + 0.02 + 0.08 * (1 - depth)), height * 0.09, 0.8)
    floor = _ridge(canvas, base + 0.19, 0.03, 3, 3, 0.5, False)
    if canvas.rng.random() < 0.8:
        _conifers(canvas, floor, int(0.14 * width), 0.10, canvas.shade((0.09, 0.20, 0.16), 0.12),
                  canvas.weather == "snowy")  # fmt: skip
    canvas.paint(_below(canvas, floor), _ground_colour(canvas, (0.22, 0.34, 0.20), 0.08))


def _desert(canvas: Canvas) -> None:
    height, width = canvas.size
    base = canvas.horizon / height
    y, x = _grid(height, width)
    if canvas.rng.random() < 0.5:  # table mountains far away
        noise = line_noise(canvas.rng, width, 5, 1)
        mesa = height * base - height * 0.09 * np.clip(6 * (noise - 0.25), 0, 1)
        canvas.paint(_below(canvas, mesa.astype(np.float32)), canvas.shade((0.62, 0.34, 0.24), 0.62))
    for depth, drop, rise in ((0.45, 0.01, 0.03), (0.25, 0.13, 0.06), (0.06, 0.28, 0.07)):
        top = _ridge(canvas, base + drop, rise, 3, 2, 0.35, False)
        mask = _below(canvas, top)
        canvas.paint(mask, _ground_colour(canvas, (0.93, 0.70, 0.40), depth))
        crest = line_noise(canvas.rng, width, 4, 1)[None, :]
        lee = (
            mask
            * np.clip(2 * np.gradient(top)[None, :] + 0.3 * crest, 0, 1)
            * np.clip(1.2 - (y - top) / (0.22 * height), 0, 1)
        )
        canvas.paint((0.6 * lee).astype(np.float32), _ground_colour(canvas, (0.58, 0.34, 0.20), depth))
        wave = np.sin((y - top * 0.8) * (0.9 + 0.5 * depth) + 0.08 * x + 2 * crest)
        ripples = mask * np.clip(wave, 0, 1) * 0.16 * np.clip((y - top) / (0.05 * height), 0, 1)
        canvas.paint(ripples.astype(np.float32), _ground_colour(canvas, (0.62, 0.40, 0.22), depth))
    for _ in range(int(canvas.rng.integers(1, 4))):
        _cactus(canvas, float(canvas.rng.uniform(0.06, 0.94) * width), height * float(canvas.rng.uniform(0.80, 0.93)))


def _cactus(canvas: Canvas, x0: float, foot: float) -> None:
    height, _ = canvas.size
    y, x = _grid(*canvas.size)
    tall = height * float(canvas.rng.uniform(0.14, 0.24))
    half = max(1.4, tall * 0.075)

    def stem(cx: float, low: float, high: float) -> Floats:
        middle = np.clip(y, high, low)
        return np.clip(half - np.hypot(x - cx, y - middle) + 0.5, 0, 1)

    mask = stem(x0, foot, foot - tall)
    for side in (-1, 1):
        if canvas.rng.random() < 0.8:
            elbow, reach = foot - tall * canvas.rng.uniform(0.35, 0.55), side * half * 3.4
            across = np.clip(half * 0.8 - np.hypot(x - np.clip(x, *sorted((x0, x0 + reach))), y - elbow) + 0.5, 0, 1)
            mask = np.maximum(mask, np.maximum(across, stem(x0 + reach, elbow, elbow - tall * 0.28)))
    canvas.paint(mask.astype(np.float32), canvas.shade((0.14, 0.34, 0.18), 0.0))


def _hills(canvas: Canvas) -> None:
    height, width = canvas.size
    base = canvas.horizon / height
    y, x = _grid(height, width)
    greens = ((0.42, 0.60, 0.34), (0.36, 0.60, 0.26), (0.30, 0.55, 0.20), (0.25, 0.48, 0.16))
    for i, (depth, drop) in enumerate(((0.75, -0.04), (0.45, 0.08), (0.22, 0.21), (0.0, 0.36))):
        top = _ridge(canvas, base + drop, 0.055, 2, 2, 0.4, False)
        mask = _below(canvas, top)
        canvas.paint(mask, _ground_colour(canvas, greens[i], depth))
        shine = mask * np.clip(1 - (y - top) / (0.10 * height), 0, 1) * 0.35
        canvas.paint(shine.astype(np.float32), _ground_colour(canvas, (0.62, 0.76, 0.36), depth))
        if i >= 1:
            stripes = np.clip(np.sin((x + (i - 2) * 0.9 * y) * 0.55), 0, 1) * mask
            canvas.paint((0.16 * stripes).astype(np.float32), _ground_colour(canvas, (0.16, 0.36, 0.12), depth))
        for _ in range(int(canvas.rng.integers(2, 6)) if i < 3 else 0):
            x0 = float(canvas.rng.uniform(0, width))
            size = height * (0.016 + 0.014 * i) * float(canvas.rng.uniform(0.8, 1.3))
            foot = float(top[int(np.clip(x0, 0, width - 1))]) + 1
            crown = np.maximum(
                _disc(canvas, x0, foot - size * 1.6, size), _disc(canvas, x0 + size * 0.7, foot - size, size * 0.7)
            )
            trunk = np.clip(0.18 * size + 0.5 - np.abs(x - x0), 0, 1) * ((y > foot - size) & (y < foot + 1))
            canvas.paint(np.maximum(crown, trunk).astype(np.float32), canvas.shade((0.12, 0.30, 0.12), depth * 0.8))
        if canvas.weather == "misty":
            _fog(canvas, height * (base + drop + 0.06), height * 0.05, 0.7)


def _water(canvas: Canvas, x0: float) -> None:
    """From the horizon down: the sky mirrored and darkened, ripples that widen towards us, a path of light under x0."""
    height, width = canvas.size
    rng = canvas.rng
    y, x = _grid(height, width)
    start = int(canvas.horizon)
    mirror = canvas.pixels[np.clip(2 * start - np.arange(start, height), 0, height - 1)]
    deep = np.asarray((0.05, 0.26, 0.42), np.float32) * canvas.tint
    t = ((y[start:] - start) / (height - start))[..., None]
    water = mirror * (0.72 - 0.30 * t) + deep * (0.28 + 0.30 * t)
    canvas.pixels[start:] = water
    depth = np.clip((y - canvas.horizon) / (height - canvas.horizon), 0.002, 1)
    phase = 26 * np.log1p(7 * depth) + 1.6 * cloud_noise(rng, canvas.size, (12, 10), 2)
    rough = 1.7 if canvas.weather == "stormy" else 1.0
    wave = np.clip(np.sin(phase), 0, 1) ** 2 * (y > canvas.horizon) * np.clip(depth * 8, 0, 1)
    canvas.paint((0.20 * rough * wave).astype(np.float32), canvas.shade((0.80, 0.90, 0.98), 0.35))
    if canvas.weather in ("clear", "starry", "misty"):
        spread = (0.03 + 0.13 * depth) * width
        path = np.exp(-(((x - x0) / spread) ** 2)) * (y > canvas.horizon) * (0.25 + 0.75 * np.clip(np.sin(phase), 0, 1))
        strength = 0.28 if canvas.weather == "misty" else 0.8
        canvas.paint((strength * path).astype(np.float32), canvas.light.disc)
    if canvas.weather == "stormy":
        foam = np.clip(cloud_noise(rng, canvas.size, (22, 14), 2) - 0.62, 0, 1) * 2.2 * (y > canvas.horizon + 3)
        canvas.paint((foam.clip(0, 1) * 0.7).astype(np.float32), canvas.shade((0.85, 0.9, 0.95), 0.1))


def _sea(canvas: Canvas, x0: float) -> None:
    _water(canvas, x0)
    height, width = canvas.size
    if canvas.weather == "misty":
        _fog(canvas, canvas.horizon, height * 0.07, 0.9)
    if canvas.weather == "snowy":  # ice floes
        y, _ = _grid(height, width)
        floes = np.clip(5 * (cloud_noise(canvas.rng, canvas.size, (14, 5), 2) - 0.35), 0, 1) * (y > canvas.horizon + 4)
        canvas.paint(floes.astype(np.float32), _ground_colour(canvas, (0.9, 0.95, 1.0), 0.1))
    if canvas.rng.random() < 0.6:
        y, x = _grid(height, width)
        bx, by = canvas.rng.uniform(0.15, 0.85) * width, canvas.horizon + height * canvas.rng.uniform(0.03, 0.16)
        size = height * canvas.rng.uniform(0.07, 0.13)
        up = np.clip((by - y) / size, 0, 1)
        sail = (
            np.clip(0.42 * size * (1 - up) - np.abs(x - bx - 0.1 * size) + 0.5, 0, 1)
            * (y < by - 0.08 * size)
            * (y > by - size)
        )
        hull = np.clip(0.5 * size - np.abs(x - bx) - 0.8 * (y - by) + 0.5, 0, 1) * (y >= by) * (y < by + 0.2 * size)
        canvas.paint(sail.astype(np.float32), canvas.shade((0.97, 0.95, 0.90), 0.15))
        canvas.paint(hull.astype(np.float32), canvas.shade((0.35, 0.18, 0.12), 0.1))


def _island(canvas: Canvas, x0: float) -> None:
    _water(canvas, x0)
    height, width = canvas.size
    rng = canvas.rng
    y, x = _grid(height, width)
    centre, shore = rng.uniform(0.34, 0.66) * width, canvas.horizon + height * 0.10
    half = width * rng.uniform(0.22, 0.31)
    across = np.clip(1 - ((x - centre) / half) ** 2, 0, 1)
    hump = (height * rng.uniform(0.15, 0.24) * across[0] ** 0.8 * (1 + 0.22 * line_noise(rng, width, 5, 3))).astype(
        np.float32
    )
    inside = np.clip(half - np.abs(x - centre), 0, 1)
    reflection = (
        _below(canvas, np.full(width, shore, np.float32)) * np.clip(shore + 0.75 * hump[None] - y + 0.5, 0, 1) * inside
    )
    canvas.paint((0.5 * reflection).astype(np.float32), canvas.shade((0.10, 0.24, 0.18), 0.1))
    beach = np.clip(1 - ((x - centre) / (half * 1.14)) ** 2, 0, 1) * height * 0.055
    canvas.paint(
        np.clip(0.5 + beach - np.abs(y - shore) * 1.6, 0, 1) * (beach > 0.3),
        _ground_colour(canvas, (0.95, 0.84, 0.58), 0.08),
    )
    land = _below(canvas, shore - hump) * (y < shore) * inside
    canvas.paint(land.astype(np.float32), _ground_colour(canvas, (0.20, 0.44, 0.18), 0.15))
    side = land * np.clip((x - centre) / half, 0, 1) * 0.5
    canvas.paint(side.astype(np.float32), canvas.shade((0.08, 0.22, 0.12), 0.15))
    for _ in range(int(rng.integers(3, 6))):
        px = float(centre + half * rng.uniform(-0.75, 0.75))
        _palm(
            canvas, px, float(shore - 0.75 * hump[int(np.clip(px, 0, width - 1))]) + 1, height * rng.uniform(0.15, 0.23)
        )
    if canvas.weather == "misty":
        _fog(canvas, shore + height * 0.02, height * 0.045, 0.75)
        _fog(canvas, canvas.horizon, height * 0.05, 0.7)


def _palm(canvas: Canvas, x0: float, foot: float, tall: float) -> None:
    y, x = _grid(*canvas.size)
    lean = canvas.rng.uniform(-0.35, 0.35)
    t = np.clip((foot - y) / tall, 0, 1)
    trunk = np.clip(0.045 * tall + 0.45 - np.abs(x - x0 - lean * tall * t**2), 0, 1) * (y <= foot) * (y >= foot - tall)
    cx, cy = x0 + lean * tall, foot - tall
    mask = trunk
    for angle in np.linspace(-0.35, np.pi + 0.35, 6) + canvas.rng.uniform(-0.15, 0.15):
        reach = tall * 0.46
        dx = (x - cx) * np.sign(np.cos(angle) + 1e-6)
        along = np.clip(dx / (abs(np.cos(angle)) * reach + 0.5), 0, 1.2)
        curve = cy - np.sin(angle) * reach * along + 0.5 * reach * along**2
        leaf = np.clip(0.085 * tall * (1.1 - along) + 0.35 - np.abs(y - curve), 0, 1) * (dx >= -0.5) * (along <= 1.0)
        mask = np.maximum(mask, leaf)
    canvas.paint(mask.astype(np.float32), canvas.shade((0.07, 0.24, 0.10), 0.03))


# --- what falls ------------------------------------------------------------------------------------------------------


def _lightning(canvas: Canvas) -> None:
    height, width = canvas.size
    y, x = _grid(height, width)
    rng = canvas.rng
    x0 = float(rng.uniform(0.15, 0.85) * width)
    rows = np.arange(int(canvas.horizon * 1.02))
    knots = max(4, int(canvas.horizon / 7))
    path = x0 + np.interp(rows, np.linspace(0, rows[-1], knots), np.cumsum(rng.uniform(-1, 1, knots)) * 0.032 * width)
    bolt = np.zeros(canvas.size, np.float32)
    near = np.abs(x - path[:, None])
    bolt[: len(rows)] = np.clip(1.5 - near, 0, 1)
    halo = np.zeros(canvas.size, np.float32)
    halo[: len(rows)] = np.exp(-near / (0.05 * width)) * 0.42
    canvas.paint(halo, (0.72, 0.76, 1.0))
    canvas.paint(bolt, (1.0, 1.0, 0.97))


def _rain(canvas: Canvas) -> None:
    y, x = _grid(*canvas.size)
    slant = x + 0.35 * y
    columns = line_noise(canvas.rng, 512, 170, 1)
    rows = cloud_noise(canvas.rng, canvas.size, (8, 24), 1)
    index = (slant * 1.3).astype(int) % 512
    streak = np.clip(columns[index] - 0.45, 0, 1) * np.clip(rows + 0.3, 0, 1)
    canvas.paint(
        (0.55 * streak).clip(0, 1).astype(np.float32),
        0.55 * canvas.haze + 0.45 * np.float32(max(canvas.light.tint)) * 0.8,
    )


def _snowfall(canvas: Canvas) -> None:
    height, width = canvas.size
    rng = canvas.rng
    layer = np.zeros((height, width), np.float32)
    count = int(0.0055 * width * height)
    for x0, y0, size in zip(
        rng.uniform(1, width - 2, count), rng.uniform(1, height - 2, count), rng.uniform(0.9, 1.8, count), strict=True
    ):
        i, j = int(y0), int(x0)
        window = np.s_[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3]
        yy, xx = np.mgrid[window]
        spot = np.clip(1.1 * np.exp(-((yy - i) ** 2 + (xx - j) ** 2) / size**2), 0, 1)
        layer[window] = np.maximum(layer[window], spot)
    brightness = 0.45 + 0.55 * min(1.0, max(canvas.light.tint))
    canvas.paint(0.9 * layer, np.asarray((0.95, 0.97, 1.0), np.float32) * brightness)


_LAND = {"forest": _forest, "mountains": _mountains, "desert": _desert, "hills": _hills}
_WATER = {"sea": _sea, "island": _island}


def render(triple: Triple, seed: int, width: int = 192, height: int = 128) -> NDArray[np.uint8]:
    """Draw `triple`. Returns (height, width, 3) sRGB bytes; the same arguments always give the same picture."""
    rng = np.random.default_rng([seed, *(sum(map(ord, part)) for part in (triple.weather, triple.place, triple.time))])
    light = LIGHTS[triple.time]
    horizon = {"forest": 0.56, "mountains": 0.62, "desert": 0.56, "sea": 0.52, "hills": 0.50, "island": 0.54}[
        triple.place
    ]
    canvas = Canvas(
        np.zeros((height, width, 3), np.float32),
        height * float(horizon + rng.uniform(-0.03, 0.03)),
        rng,
        light,
        triple.weather,
    )
    air = np.asarray(light.horizon, np.float32)
    canvas.tint = np.asarray(light.tint, np.float32)
    if triple.weather == "misty":
        grey = np.float32(air.mean())
        air = 0.62 * air + 0.30 * grey + 0.06 * max(light.tint)
    elif triple.weather == "stormy":
        air = 0.55 * air * np.float32(0.75) + 0.10 * max(light.tint)
        canvas.tint = canvas.tint * np.float32(0.72)
    elif triple.weather == "snowy":
        air = 0.6 * air + 0.34 * canvas.tint
    elif triple.weather == "starry":
        canvas.tint = canvas.tint * np.float32(0.88)
    canvas.haze = np.clip(air, 0, 1).astype(np.float32)

    x0, _ = _sky(canvas)
    if triple.weather == "stormy" and rng.random() < 0.85:
        _lightning(canvas)
    if triple.place in _LAND:
        _LAND[triple.place](canvas)
    else:
        _WATER[triple.place](canvas, x0)
    if triple.weather == "stormy":
        _rain(canvas)
    elif triple.weather == "snowy":
        _snowfall(canvas)
    elif triple.weather == "misty":
        _fog(canvas, canvas.horizon, height * 0.10, 0.45)
    return (np.clip(canvas.pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
