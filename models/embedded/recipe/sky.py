"""Skies: the gradient of the hour, sun or moon with its glow, stars and clouds."""

from __future__ import annotations

import numpy as np

from models.embedded.recipe.canvas import LIGHTS, Canvas, cloud_noise, disc_at, grid, spot_at


def sky(canvas: Canvas) -> tuple[float, float]:
    """Gradient, disc and clouds. Returns where the disc stands (x, y), pixels."""
    height, width = canvas.size
    light, rng = canvas.light, canvas.rng
    y, x = grid(height, width)
    t = np.clip(y / canvas.horizon, 0, 1)
    stops = np.asarray([light.top, light.middle, light.horizon], np.float32)
    rows = np.stack([np.interp(t[:, 0], [0, 0.62, 1.0], stops[:, c]) for c in range(3)], -1).astype(np.float32)
    if canvas.weather == "starry":
        dark = np.asarray([0.02, 0.03, 0.12], np.float32)
        keep = 0.42 + 0.48 * t
        rows = rows * keep + dark * (1 - keep)
    elif canvas.weather == "misty":
        rows += 0.45 * (canvas.haze - rows)
    elif canvas.weather == "snowy":
        grey = rows.mean(-1, keepdims=True) * 0.75 + 0.20 * max(light.tint)
        rows += 0.50 * (grey - rows)
    elif canvas.weather == "stormy":
        grey = rows.mean(-1, keepdims=True)
        rows = (0.45 * rows + 0.25 * grey) * (0.62 + 0.30 * t**2)
    canvas.pixels[:] = rows[:, None, :]

    x0 = float(rng.uniform(0.15, 0.85) * width)
    y0 = float(canvas.horizon * (1 - rng.uniform(*light.height)))
    distance = np.hypot(x - x0, y - y0) / height
    strength = {"misty": 0.55, "snowy": 0.40, "stormy": 0.0, "starry": 0.8}.get(canvas.weather, 1.0)
    glow = strength * light.glow * (0.6 * np.exp(-((distance / 0.16) ** 2)) + 0.4 * np.exp(-distance / 0.30))
    canvas.paint(glow.astype(np.float32), light.disc)
    if canvas.weather == "starry":
        _stars(canvas)
    if strength:
        canvas.paint(disc_at(canvas, x0, y0, light.radius * height) * min(1.0, strength + 0.25), light.disc)
        if canvas.light is LIGHTS["twilight"] or canvas.light is LIGHTS["night"]:
            bite = disc_at(canvas, x0 - 0.4 * light.radius * height, y0 - 0.2 * light.radius * height,
                         0.85 * light.radius * height)  # fmt: skip
            if rng.random() < 0.5:
                t0 = min(max(y0 / canvas.horizon, 0), 1)
                canvas.paint(bite * disc_at(canvas, x0, y0, light.radius * height), rows[int(t0 * canvas.horizon)])
    _clouds(canvas)
    return x0, y0


def _stars(canvas: Canvas) -> None:
    """Points of three sizes over the whole sky and a band of many faint ones."""
    height, width = canvas.size
    rng = canvas.rng
    layer = np.zeros((height, width), np.float32)
    slope, offset = rng.uniform(-0.5, 0.5), rng.uniform(0.2, 0.6) * canvas.horizon
    y, x = grid(height, width)
    band = np.exp(-(((y - offset - slope * (x - width / 2)) / (0.16 * height)) ** 2))
    canvas.paint((0.16 * band * (1 + 0.5 * cloud_noise(canvas, (4, 6), 2))).clip(0, 1), (0.62, 0.64, 0.85))
    scale = canvas.scale
    count = int(0.0065 * (width // scale) * (canvas.horizon / scale))
    xs, ys = rng.uniform(1, width // scale - 2, count), rng.uniform(1, canvas.horizon / scale, count)
    for x0, y0, size in zip(xs, ys, rng.choice([0.9, 1.2, 1.6], count, p=[0.5, 0.35, 0.15]), strict=True):
        window, square = spot_at(canvas, x0, y0)
        spread = size * (0.6 + 0.4 * scale)  # drawn larger, a star is a finer point
        spot = np.exp(-square / (0.55 * spread**2)) * min(1.0, 0.55 + 0.35 * size)
        layer[window] = np.maximum(layer[window], spot)
    fade = np.clip((canvas.horizon - y) / (0.12 * canvas.horizon), 0, 1)
    canvas.paint(layer * fade, (0.98, 0.98, 1.0))


def _clouds(canvas: Canvas) -> None:
    rng, light = canvas.rng, canvas.light
    y, _ = grid(*canvas.size)
    up = np.clip(1 - y / canvas.horizon, 0, 1)
    if canvas.weather == "stormy":
        field_ = cloud_noise(canvas, (5, 4), 4)
        mask = np.clip(0.55 + 0.9 * field_ + 0.9 * (up - 0.45), 0, 1) * np.clip(3 * up + 0.1, 0, 1)
        lit = np.clip(0.5 + 0.8 * cloud_noise(canvas, (6, 5), 3), 0, 1)[..., None]
        base = np.asarray(light.middle, np.float32) * 0.32 + 0.10 * max(light.tint) + 0.01
        canvas.paint((0.92 * mask).astype(np.float32), base * (0.50 + 0.75 * lit))
        return
    if canvas.weather in ("misty", "starry"):
        return
    if canvas.weather == "snowy":
        mask = np.clip(0.35 + 0.8 * cloud_noise(canvas, (4, 4), 3), 0, 1) * 0.55
        grey = np.asarray(light.horizon, np.float32) * 0.45 + 0.42 * np.asarray(light.tint, np.float32)
        canvas.paint((mask * np.clip(3 * up, 0, 1)).astype(np.float32), grey.clip(0, 0.95))
        return
    mask = np.clip(1.7 * cloud_noise(canvas, (9, 3), 3) - rng.uniform(0.6, 1.3), 0, 1)
    mask = mask * np.clip(4 * up, 0, 1) * np.clip(3 * (1 - up), 0, 1)
    white = 0.55 * np.asarray(light.horizon, np.float32) + 0.5 * np.asarray(light.disc, np.float32) * max(light.tint)
    canvas.paint((0.75 * mask).astype(np.float32), white.clip(0, 1))
