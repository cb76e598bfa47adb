"""Faces in a picture: by the detector that OpenCV brings, or by one in the operator's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import yolo
from .cascade import Box, find

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Box", "find", "finder"]


def finder(detector: Path | None) -> Callable[[Image.Image], list[Box]]:
    """`find`, or its like by the operator's file. Raises DetectorFailed."""
    return find if detector is None else yolo.load(detector).find
