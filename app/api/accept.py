"""Which form of answer a client wants."""

from __future__ import annotations

from typing import get_args

from app.engine.base import OutputFormat

MEDIA_TYPES: dict[str, OutputFormat] = {f"image/{name}": name for name in get_args(OutputFormat)}


def accepted_image(header: str, output_format: OutputFormat) -> OutputFormat | None:
    """The picture format that an Accept header prefers to JSON, None for JSON.

    `image/*` stands for `output_format`. JSON wins a tie, and a header that names neither.
    """
    best: OutputFormat | None = None
    best_quality = json_quality = 0.0
    for part in header.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        quality = _quality(parameters)
        if kind == "application/json":
            json_quality = max(json_quality, quality)
        wanted = output_format if kind == "image/*" else MEDIA_TYPES.get(kind)
        if wanted is not None and quality > best_quality:
            best, best_quality = wanted, quality
    return best if best_quality > json_quality else None


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0
