"""A part of a picture that is drawn by itself and put back: a face, or what a mask leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

Frame = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of a picture, pixels."""


@dataclass(frozen=True, slots=True)
class Region:
    """weights: L, of the frame's size; how much of what is drawn shows there, 0 leaves each bit of the picture."""

    frame: Frame
    weights: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        return self.weights.size

    def cut(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        """What of the picture is in the frame, resampled to `size`."""
        part = picture.crop(self.frame)
        return part if part.size == size else part.resize(size, Image.Resampling.LANCZOS)

    def put_back(self, picture: Image.Image, drawn: Image.Image) -> Image.Image:
        """The picture with `drawn` in the frame, of whatever size that was drawn."""
        result = picture.copy()
        if drawn.size != self.size:
            drawn = drawn.resize(self.size, Image.Resampling.LANCZOS)
        result.paste(drawn, self.frame[:2], self.weights)
        return result


def framed(box: Frame, wanted: tuple[int, int], size: tuple[int, int]) -> Frame:
    """A frame of the `wanted` size around the middle of `box`, moved and cut to lie within a picture of `size`."""
    edges = []
    for start, end, side, whole in zip(box[:2], box[2:], wanted, size, strict=True):
        kept = min(side, whole)
        edges.append((min(max(start + (end - start - kept) // 2, 0), whole - kept), kept))
    (left, width), (top, height) = edges
    return left, top, left + width, top + height
