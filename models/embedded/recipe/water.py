"""Places at sea: open water and an island."""

from __future__ import annotations

import numpy as np

from models.embedded.recipe.canvas import Canvas, below, cloud_noise, fog, grid, ground_colour, line_noise


def _water(canvas: Canvas, x0: float) -> None:
    """From the horizon down: the sky mirrored and darkened, ripples that widen towards us, a path of light under x0."""
    height, width = canvas.size
    y, x = grid(height, width)
    start = canvas.scale * int(canvas.horizon / canvas.scale)
    mirror = canvas.pixels[np.clip(2 * start - np.arange(start, height), 0, height - 1)]
    deep = np.asarray((0.05, 0.26, 0.42), np.float32) * canvas.tint
    t = ((y[start:] - start) / (height - start))[..., None]
    water = mirror * (0.72 - 0.30 * t) + deep * (0.28 + 0.30 * t)
    canvas.pixels[start:] = water
    depth = np.clip((y - canvas.horizon) / (height - canvas.horizon), 0.002, 1)
    phase = 26 * np.log1p(7 * depth) + 1.6 * cloud_noise(canvas, (12, 10), 2)
    rough = 1.7 if canvas.weather == "stormy" else 1.0
    wave = np.clip(np.sin(phase), 0, 1) ** 2 * (y > canvas.horizon) * np.clip(depth * 8, 0, 1)
    canvas.paint((0.20 * rough * wave).astype(np.float32), canvas.shade((0.80, 0.90, 0.98), 0.35))
    if canvas.weather in ("clear", "starry", "misty"):
        spread = (0.03 + 0.13 * depth) * width
        path = np.exp(-(((x - x0) / spread) ** 2)) * (y > canvas.horizon) * (0.25 + 0.75 * np.clip(np.sin(phase), 0, 1))
        strength = 0.28 if canvas.weather == "misty" else 0.8
        canvas.paint((strength * path).astype(np.float32), canvas.light.disc)
    if canvas.weather == "stormy":
        foam = np.clip(cloud_noise(canvas, (22, 14), 2) - 0.62, 0, 1) * 2.2 * (y > canvas.horizon + 3 * canvas.scale)
        canvas.paint((foam.clip(0, 1) * 0.7).astype(np.float32), canvas.shade((0.85, 0.9, 0.95), 0.1))


def sea(canvas: Canvas, x0: float) -> None:
    _water(canvas, x0)
    height, width = canvas.size
    if canvas.weather == "misty":
        fog(canvas, canvas.horizon, height * 0.07, 0.9)
    if canvas.weather == "snowy":  # ice floes
        y, _ = grid(height, width)
        floes = np.clip(5 * (cloud_noise(canvas, (14, 5), 2) - 0.35), 0, 1) * (y > canvas.horizon + 4 * canvas.scale)
        canvas.paint(floes.astype(np.float32), ground_colour(canvas, (0.9, 0.95, 1.0), 0.1))
    if canvas.rng.random() < 0.6:
        y, x = grid(height, width)
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


def island(canvas: Canvas, x0: float) -> None:
    _water(canvas, x0)
    height, width = canvas.size
    rng = canvas.rng
    y, x = grid(height, width)
    centre, shore = rng.uniform(0.34, 0.66) * width, canvas.horizon + height * 0.10
    half = width * rng.uniform(0.22, 0.31)
    across = np.clip(1 - ((x - centre) / half) ** 2, 0, 1)
    hump = (height * rng.uniform(0.15, 0.24) * across[0] ** 0.8 * (1 + 0.22 * line_noise(canvas, 5, 3))).astype(
        np.float32
    )
    inside = np.clip(half - np.abs(x - centre), 0, 1)
    reflection = (
        below(canvas, np.full(width, shore, np.float32)) * np.clip(shore + 0.75 * hump[None] - y + 0.5, 0, 1) * inside
    )
    canvas.paint((0.5 * reflection).astype(np.float32), canvas.shade((0.10, 0.24, 0.18), 0.1))
    beach = np.clip(1 - ((x - centre) / (half * 1.14)) ** 2, 0, 1) * height * 0.055
    canvas.paint(
        np.clip(0.5 + beach - np.abs(y - shore) * 1.6, 0, 1) * (beach > 0.3 * canvas.scale),
        ground_colour(canvas, (0.95, 0.84, 0.58), 0.08),
    )
    land = below(canvas, shore - hump) * (y < shore) * inside
    canvas.paint(land.astype(np.float32), ground_colour(canvas, (0.20, 0.44, 0.18), 0.15))
    side = land * np.clip((x - centre) / half, 0, 1) * 0.5
    canvas.paint(side.astype(np.float32), canvas.shade((0.08, 0.22, 0.12), 0.15))
    for _ in range(int(rng.integers(3, 6))):
        px = float(centre + half * rng.uniform(-0.75, 0.75))
        foot = float(shore - 0.75 * hump[int(np.clip(px, 0, width - 1))]) + canvas.scale
        _palm(canvas, px, foot, height * rng.uniform(0.15, 0.23))
    if canvas.weather == "misty":
        fog(canvas, shore + height * 0.02, height * 0.045, 0.75)
        fog(canvas, canvas.horizon, height * 0.05, 0.7)


def _palm(canvas: Canvas, x0: float, foot: float, tall: float) -> None:
    y, x = grid(*canvas.size)
    lean = canvas.rng.uniform(-0.35, 0.35)
    t = np.clip((foot - y) / tall, 0, 1)
    trunk = np.clip(0.045 * tall + 0.45 - np.abs(x - x0 - lean * tall * t**2), 0, 1) * (y <= foot) * (y >= foot - tall)
    cx, cy = x0 + lean * tall, foot - tall
    mask = trunk
    for angle in np.linspace(-0.35, np.pi + 0.35, 6) + canvas.rng.uniform(-0.15, 0.15):
        reach = tall * 0.46
        dx = (x - cx) * np.sign(np.cos(angle) + 1e-6)
        along = np.clip(dx / (abs(np.cos(angle)) * reach + 0.5 * canvas.scale), 0, 1.2)
        curve = cy - np.sin(angle) * reach * along + 0.5 * reach * along**2
        leaf = np.clip(0.085 * tall * (1.1 - along) + 0.35 - np.abs(y - curve), 0, 1) * (dx >= -0.5) * (along <= 1.0)
        mask = np.maximum(mask, leaf)
    canvas.paint(mask.astype(np.float32), canvas.shade((0.07, 0.24, 0.10), 0.03))
