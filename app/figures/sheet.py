"""The sheet of a comparison: settings side by side, each with its picture, what it cost and what it did."""

from __future__ import annotations

import numpy as np
from PIL import Image

from app.compare import Comparison, Row
from app.figures.canvas import INK, PALE, RULE, Canvas, wrapped

_MARGIN, _GAP = 28, 20
_TILE = (340, 400)  # pixels, the most that a picture is shown in
_TITLE, _LARGE, _TEXT, _SMALL = 30, 28, 22, 18
_LINE = 1.35  # of a text's size
_STRIP = 26
_GAINS = (1, 2, 4, 8, 16, 32, 64)


def draw(comparison: Comparison, *, difference: bool = False) -> Image.Image:
    """RGB. `difference`: below each picture how far it is from the uncached one, made brighter alike for all."""
    rows = comparison.rows
    tile = _fitted(rows[0].picture.size)
    width = 2 * _MARGIN + len(rows) * tile[0] + (len(rows) - 1) * _GAP
    title = wrapped(f"“{comparison.prompt}”", _TITLE, width - 2 * _MARGIN - 260, 2)
    footer = wrapped(comparison.conditions, _SMALL, width - 2 * _MARGIN, 4)
    top = _MARGIN + _high(_TITLE) * len(title) + _high(_TEXT) + _GAP
    words = _high(_LARGE) + 4 * _high(_TEXT) + _GAP // 2
    shown = tile[1] + words + _STRIP + _GAP
    bottom = top + shown + (tile[1] + _high(_TEXT) + _GAP if difference else 0)
    page = Canvas(width, bottom + _high(_SMALL) * len(footer) + _MARGIN)
    for number, line in enumerate(title):
        page.write((_MARGIN, _MARGIN + number * _high(_TITLE)), line, _TITLE)
    page.write((_MARGIN, _MARGIN + len(title) * _high(_TITLE)), comparison.settings, _TEXT, PALE)
    page.legend(width - _MARGIN, _MARGIN + 4, _TEXT)
    differences = _differences(rows) if difference else None
    for number, row in enumerate(rows):
        left = _MARGIN + number * (tile[0] + _GAP)
        page.image.paste(row.picture.resize(tile, Image.Resampling.LANCZOS), (left, top))
        _describe(page, row, left, top + tile[1] + _GAP // 2, tile[0])
        if differences is not None:
            gain, pictures = differences
            if not row.reference:
                page.write((left, top + shown), f"difference, {gain} times", _TEXT, PALE)
                brighter = pictures[number].resize(tile, Image.Resampling.LANCZOS)
                page.image.paste(brighter, (left, top + shown + _high(_TEXT)))
    page.draw.line((_MARGIN, bottom - 8, width - _MARGIN, bottom - 8), fill=RULE)
    for number, line in enumerate(footer):
        page.write((_MARGIN, bottom + number * _high(_SMALL)), line, _SMALL, PALE)
    return page.image


def _describe(page: Canvas, row: Row, left: int, top: int, width: int) -> None:
    page.write((left, top), row.name, _LARGE)
    top += _high(_LARGE)
    for line, colour in (
        (row.detail, PALE),
        (f"{row.seconds:.2f} s" + (f",  {row.speedup:.2f} times as fast" if not row.reference else ""), INK),
        (_likeness(row), INK),
        (f"hit rate {row.hit_rate:.2f}  ({row.reused} of {row.calls})", INK),
    ):
        page.write((left, top), line, _TEXT, colour)
        top += _high(_TEXT)
    top += 6
    page.strip((left, top, left + width, top + _STRIP), row.decisions)


def _likeness(row: Row) -> str:
    if row.reference:
        return "what the others are held against"
    return "identical to uncached" if row.psnr_db is None else f"{row.psnr_db:.1f} dB PSNR to uncached"


def _differences(rows: tuple[Row, ...]) -> tuple[int, list[Image.Image]]:
    """The gain, and a picture of |difference| · gain a row; the gain is the highest that clips one sample in 1000."""
    base = np.asarray(rows[0].picture, np.int16)
    found = [np.abs(np.asarray(row.picture, np.int16) - base) for row in rows]
    bright = max(1.0, float(max(np.quantile(one, 0.999) for one in found)))
    gain = max((gain for gain in _GAINS if gain * bright <= 255), default=1)
    return gain, [Image.fromarray(np.minimum(one * gain, 255).astype(np.uint8)) for one in found]


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(most / pixels for most, pixels in zip(_TILE, size, strict=True))
    return round(size[0] * scale), round(size[1] * scale)


def _high(size: int) -> int:
    return round(size * _LINE)
