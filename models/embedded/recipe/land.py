"""Places on land: forest, mountains, desert, hills."""

from __future__ import annotations

import numpy as np

from models.embedded.recipe.canvas import Canvas, Floats, below, disc_at, fog, grid, ground_colour, line_noise, ridge


def _conifers(canvas: Canvas, feet: Floats, count: int, size: float, colour: Floats, snow: bool) -> None:
    """Trees whose trunks stand on the line `feet` (w,); `size` in parts of the height."""
    height, width = canvas.size
    rng = canvas.rng
    mask = np.zeros((height, width), np.float32)
    white = np.zeros((height, width), np.float32)
    for x0 in np.sort(rng.uniform(-0.02 * width, 1.02 * width, count)):
        tall = height * size * rng.uniform(0.55, 1.15)
        half = tall * rng.uniform(0.20, 0.27)
        foot = float(feet[int(np.clip(x0, 0, width - 1))]) + canvas.scale
        top, left = int(max(foot - tall - 1, 0)), int(np.clip(x0 - half - 2, 0, width))
        window = np.s_[top : min(int(foot) + 1, height), left : int(np.clip(x0 + half + 3, left, width))]
        yy, xx = np.mgrid[window].astype(np.float32) + 0.5
        if not yy.size:
            continue
        t = np.clip((yy - (foot - tall)) / tall, 0, 1)
        tiers = max(3.0, tall / (5.5 * canvas.scale))
        saw = (t * tiers) % 1.0
        spread = half * (0.10 + 0.90 * t) * (0.45 + 0.55 * saw)
        tree = np.clip(spread - np.abs(xx - x0) + 0.5, 0, 1) * np.clip(yy - (foot - tall) + 0.5, 0, 1)
        mask[window] = np.maximum(mask[window], tree)
        if snow:
            white[window] = np.maximum(white[window] * (1 - tree), tree * np.clip(1.6 - 3.2 * saw, 0, 1))
    canvas.paint(mask, colour)
    if snow:
        canvas.paint(white * 0.75, np.asarray((0.93, 0.95, 1.0), np.float32) * canvas.tint)


def forest(canvas: Canvas) -> None:
    height, width = canvas.size
    snow = canvas.weather == "snowy"
    if canvas.rng.random() < 0.7:
        far = ridge(canvas, canvas.horizon / height - 0.02, 0.05, 3, 4, 0.5, False)
        canvas.paint(below(canvas, far), canvas.shade((0.24, 0.36, 0.36), 0.85))
    for depth, base, size, density in ((0.72, 0.60, 0.16, 0.30), (0.45, 0.70, 0.26, 0.17), (0.20, 0.82, 0.38, 0.085)):
        feet = ridge(canvas, base + 0.02, 0.02, 4, 3, 0.5, False)
        colour = canvas.shade((0.10, 0.26, 0.17), depth)
        _conifers(canvas, feet, int(density * (width // canvas.scale)), size, colour, snow)
        canvas.paint(below(canvas, feet), ground_colour(canvas, (0.13, 0.28, 0.17), depth))
        if canvas.weather == "misty":
            fog(canvas, height * (base + 0.01), height * 0.06, 0.75)
    feet = ridge(canvas, 1.0, 0.02, 4, 2, 0.5, False)
    _conifers(canvas, feet, int(canvas.rng.integers(3, 7)), 0.62, canvas.shade((0.05, 0.15, 0.10), 0.0), snow)


def mountains(canvas: Canvas) -> None:
    height, width = canvas.size
    base = canvas.horizon / height
    y, _ = grid(height, width)
    window = 9 * canvas.scale
    for depth, lift, rise, knots in ((0.85, 0.12, 0.13, 4), (0.58, 0.10, 0.17, 3), (0.30, -0.04, 0.14, 3)):
        top = ridge(canvas, base - lift, rise, knots, 5, 0.38, True)
        mask = below(canvas, top)
        canvas.paint(mask, canvas.shade((0.34, 0.36, 0.44), depth))
        slope = np.convolve(np.gradient(top), np.full(window, 1 / window), mode="same")[None, :]
        side = np.clip(0.5 + 0.9 * slope, 0, 1)
        shadow = mask * side * np.clip(1 - (y - top) / (0.35 * height), 0, 1)
        canvas.paint((0.42 * shadow).astype(np.float32), canvas.shade((0.14, 0.15, 0.22), depth))
        line = height * (base - 0.02) if canvas.weather == "snowy" else height * (base - 0.10 - 0.03 * depth)
        ragged = line_noise(canvas, 12, 3)[None, :] * 0.035 * height
        caps = mask * np.clip((line + ragged - y) / 2.5, 0, 1) * (1 - 0.5 * side)
        canvas.paint(caps.astype(np.float32), canvas.shade((0.95, 0.96, 1.0), depth * 0.7))
        if canvas.weather == "misty":
            fog(canvas, height * (base + 0.02 + 0.08 * (1 - depth)), height * 0.09, 0.8)
    floor = ridge(canvas, base + 0.19, 0.03, 3, 3, 0.5, False)
    if canvas.rng.random() < 0.8:
        _conifers(canvas, floor, int(0.14 * (width // canvas.scale)), 0.10, canvas.shade((0.09, 0.20, 0.16), 0.12),
                  canvas.weather == "snowy")  # fmt: skip
    canvas.paint(below(canvas, floor), ground_colour(canvas, (0.22, 0.34, 0.20), 0.08))


def desert(canvas: Canvas) -> None:
    height, width = canvas.size
    base = canvas.horizon / height
    y, x = grid(height, width)
    if canvas.rng.random() < 0.5:  # table mountains far away
        noise = line_noise(canvas, 5, 1)
        mesa = height * base - height * 0.09 * np.clip(6 * (noise - 0.25), 0, 1)
        canvas.paint(below(canvas, mesa.astype(np.float32)), canvas.shade((0.62, 0.34, 0.24), 0.62))
    for depth, drop, rise in ((0.45, 0.01, 0.03), (0.25, 0.13, 0.06), (0.06, 0.28, 0.07)):
        top = ridge(canvas, base + drop, rise, 3, 2, 0.35, False)
        mask = below(canvas, top)
        canvas.paint(mask, ground_colour(canvas, (0.93, 0.70, 0.40), depth))
        crest = line_noise(canvas, 4, 1)[None, :]
        lee = (
            mask
            * np.clip(2 * np.gradient(top)[None, :] + 0.3 * crest, 0, 1)
            * np.clip(1.2 - (y - top) / (0.22 * height), 0, 1)
        )
        canvas.paint((0.6 * lee).astype(np.float32), ground_colour(canvas, (0.58, 0.34, 0.20), depth))
        wave = np.sin(((y - top * 0.8) * (0.9 + 0.5 * depth) + 0.08 * x) / canvas.scale + 2 * crest)
        ripples = mask * np.clip(wave, 0, 1) * 0.16 * np.clip((y - top) / (0.05 * height), 0, 1)
        canvas.paint(ripples.astype(np.float32), ground_colour(canvas, (0.62, 0.40, 0.22), depth))
    for _ in range(int(canvas.rng.integers(1, 4))):
        _cactus(canvas, float(canvas.rng.uniform(0.06, 0.94) * width), height * float(canvas.rng.uniform(0.80, 0.93)))


def _cactus(canvas: Canvas, x0: float, foot: float) -> None:
    height, _ = canvas.size
    y, x = grid(*canvas.size)
    tall = height * float(canvas.rng.uniform(0.14, 0.24))
    half = max(1.4 * canvas.scale, tall * 0.075)

    def stem(cx: float, low: float, high: float) -> Floats:
        middle = np.clip(y, high, low)
        return np.clip(half - np.hypot(x - cx, y - middle) + 0.5, 0, 1)

    mask = stem(x0, foot, foot - tall)
    for side in (-1, 1):
        if canvas.rng.random() < 0.8:
            elbow, reach = foot - tall * canvas.rng.uniform(0.35, 0.55), side * half * 3.4
            across = np.clip(
                half * 0.8 - np.hypot(x - np.clip(x, min(x0, x0 + reach), max(x0, x0 + reach)), y - elbow) + 0.5, 0, 1
            )
            mask = np.maximum(mask, np.maximum(across, stem(x0 + reach, elbow, elbow - tall * 0.28)))
    canvas.paint(mask.astype(np.float32), canvas.shade((0.14, 0.34, 0.18), 0.0))


def hills(canvas: Canvas) -> None:
    height, width = canvas.size
    base = canvas.horizon / height
    y, x = grid(height, width)
    greens = ((0.42, 0.60, 0.34), (0.36, 0.60, 0.26), (0.30, 0.55, 0.20), (0.25, 0.48, 0.16))
    for i, (depth, drop) in enumerate(((0.75, -0.04), (0.45, 0.08), (0.22, 0.21), (0.0, 0.36))):
        top = ridge(canvas, base + drop, 0.055, 2, 2, 0.4, False)
        mask = below(canvas, top)
        canvas.paint(mask, ground_colour(canvas, greens[i], depth))
        shine = mask * np.clip(1 - (y - top) / (0.10 * height), 0, 1) * 0.35
        canvas.paint(shine.astype(np.float32), ground_colour(canvas, (0.62, 0.76, 0.36), depth))
        if i >= 1:
            stripes = np.clip(np.sin((x + (i - 2) * 0.9 * y) * 0.55 / canvas.scale), 0, 1) * mask
            canvas.paint((0.16 * stripes).astype(np.float32), ground_colour(canvas, (0.16, 0.36, 0.12), depth))
        for _ in range(int(canvas.rng.integers(2, 6)) if i < 3 else 0):
            x0 = float(canvas.rng.uniform(0, width))
            size = height * (0.016 + 0.014 * i) * float(canvas.rng.uniform(0.8, 1.3))
            foot = float(top[int(np.clip(x0, 0, width - 1))]) + canvas.scale
            crown = np.maximum(
                disc_at(canvas, x0, foot - size * 1.6, size), disc_at(canvas, x0 + size * 0.7, foot - size, size * 0.7)
            )
            trunk = np.clip(0.18 * size + 0.5 - np.abs(x - x0), 0, 1) * ((y > foot - size) & (y < foot + 1))
            canvas.paint(np.maximum(crown, trunk).astype(np.float32), canvas.shade((0.12, 0.30, 0.12), depth * 0.8))
        if canvas.weather == "misty":
            fog(canvas, height * (base + drop + 0.06), height * 0.05, 0.7)
