"""Masks and margins of pictures: what is drawn anew, and what is put around a picture so that it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

INPAINTING = (9, 384)  # channels that a UNet and a Flux take where a mask and the masked picture lie beside the latents
PAINTED = 128  # of 255: so light a pixel of a mask is drawn


def hard(mask: Image.Image) -> Image.Image:
    """The mask, L, without greys: 255 where it is drawn, else 0."""
    return mask.point(lambda level: 255 if level >= PAINTED else 0)


def everything(size: tuple[int, int]) -> Image.Image:
    """A mask of `size` (width, height) under which all is drawn."""
    from PIL import Image

    return Image.new("L", size, 255)


def nothing(size: tuple[int, int]) -> Image.Image:
    """A picture of `size` that a mask of everything hides."""
    from PIL import Image

    return Image.new("RGB", size)


def cells(mask: Image.Image, size: tuple[int, int], side: int) -> Image.Image:
    """A mask of `size` pixels in which each latent, `side` pixels square, is drawn whole or not at all.

    It is drawn where any part of it is in `mask`, a hard one of any size. diffusers' pipelines look at one pixel of
    each latent alone, and do not see a thin line.
    """
    from PIL import Image

    grid = (size[0] // side, size[1] // side)
    touched = mask.convert("F").resize(grid, Image.Resampling.BOX)  # shares of each latent: 0 is none
    return touched.point(lambda level: level * 1e9).convert("L").resize(size, Image.Resampling.NEAREST)


def extended(image: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    """`image` with so many pixels more on each side, which repeat its edge."""
    import numpy as np
    from PIL import Image

    if not (left or top or right or bottom):
        return image
    levels = np.asarray(image)
    around = [(top, bottom), (left, right), (0, 0)][: levels.ndim]
    return Image.fromarray(np.pad(levels, around, mode="edge"))


def widened(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image`, extended evenly on two sides to the aspect of width × height: what `limits.fit` cuts off again."""
    scale = max(image.width / width, image.height / height)
    across, down = (
        max(0, round((scale * side - own) / 2)) for side, own in zip((width, height), image.size, strict=True)
    )
    return extended(image, across, down, across, down)
