"""Landscapes drawn from a triple of the grammar and a seed: the only pictures that the embedded models ever saw.

Everything is a soft-edged layer painted far to near over a sky: ridges with aerial perspective, conifers as saw-toothed
silhouettes, water with ripples and a glitter path, then what the weather adds. Arrays are (height, width, 3) floats in
0…1, y down.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.embedded.recipe.canvas import LIGHTS, Canvas, cloud_noise, fog, grid, line_noise, spot_at
from models.embedded.recipe.grammar import Triple
from models.embedded.recipe.land import desert, forest, hills, mountains
from models.embedded.recipe.sky import sky
from models.embedded.recipe.water import island, sea


def _lightning(canvas: Canvas) -> None:
    height, width = canvas.size
    _, x = grid(height, width)
    rng = canvas.rng
    x0 = float(rng.uniform(0.15, 0.85) * width)
    rows = np.arange(int(canvas.horizon * 1.02))
    knots = max(4, int(canvas.horizon / canvas.scale / 7))
    path = x0 + np.interp(rows, np.linspace(0, rows[-1], knots), np.cumsum(rng.uniform(-1, 1, knots)) * 0.032 * width)
    bolt = np.zeros(canvas.size, np.float32)
    near = np.abs(x - path[:, None])
    bolt[: len(rows)] = np.clip(0.9 + 0.6 * canvas.scale - near, 0, 1)
    halo = np.zeros(canvas.size, np.float32)
    halo[: len(rows)] = np.exp(-near / (0.05 * width)) * 0.42
    canvas.paint(halo, (0.72, 0.76, 1.0))
    canvas.paint(bolt, (1.0, 1.0, 0.97))


def _rain(canvas: Canvas) -> None:
    y, x = grid(*canvas.size)
    slant = x + 0.35 * y
    columns = line_noise(canvas, 170, 1, size=512 * canvas.scale)
    rows = cloud_noise(canvas, (8, 24), 1)
    index = (slant * 1.3).astype(int) % len(columns)
    streak = np.clip(columns[index] - 0.45, 0, 1) * np.clip(rows + 0.3, 0, 1)
    canvas.paint(
        (0.55 * streak).clip(0, 1).astype(np.float32),
        0.55 * canvas.haze + 0.45 * np.float32(max(canvas.light.tint)) * 0.8,
    )


def _snowfall(canvas: Canvas) -> None:
    height, width = canvas.size
    rng = canvas.rng
    layer = np.zeros((height, width), np.float32)
    wide, high = width // canvas.scale, height // canvas.scale
    count = int(0.0055 * wide * high)
    for x0, y0, size in zip(
        rng.uniform(1, wide - 2, count), rng.uniform(1, high - 2, count), rng.uniform(0.9, 1.8, count), strict=True
    ):
        window, square = spot_at(canvas, x0, y0)
        spread = size * (0.6 + 0.4 * canvas.scale)
        layer[window] = np.maximum(layer[window], np.clip(1.1 * np.exp(-square / spread**2), 0, 1))
    brightness = 0.45 + 0.55 * min(1.0, max(canvas.light.tint))
    canvas.paint(0.9 * layer, np.asarray((0.95, 0.97, 1.0), np.float32) * brightness)


_LAND = {"forest": forest, "mountains": mountains, "desert": desert, "hills": hills}
_WATER = {"sea": sea, "island": island}


def render(triple: Triple, seed: int, width: int = 192, height: int = 128, scale: int = 1) -> NDArray[np.uint8]:
    """Draw `triple`. Returns sRGB bytes, (height, width, 3); the same arguments always give the same picture.

    scale: the same scene so many times as large, (scale × height, scale × width, 3), its edges and points as fine as
    they are at that size.
    """
    rng = np.random.default_rng([seed, *(sum(map(ord, part)) for part in (triple.weather, triple.place, triple.time))])
    light = LIGHTS[triple.time]
    horizon = {"forest": 0.56, "mountains": 0.62, "desert": 0.56, "sea": 0.52, "hills": 0.50, "island": 0.54}[
        triple.place
    ]
    height, width = scale * height, scale * width
    canvas = Canvas(
        np.zeros((height, width, 3), np.float32),
        height * float(horizon + rng.uniform(-0.03, 0.03)),
        rng,
        light,
        triple.weather,
        scale,
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

    x0, _ = sky(canvas)
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
        fog(canvas, canvas.horizon, height * 0.10, 0.45)
    return (np.clip(canvas.pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
