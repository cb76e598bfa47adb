"""Enlarging pictures: by a network in the operator's folder, ESRGAN and its like, which spandrel reads, or plainly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import finite
from .base import Enlargement, ResamplingName, Upscaler
from .errors import UpscalerFailed
from .libraries import first_line, quiet

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

MOST_BYTES = 2**30  # of a file; the largest published one has a third of it
MOST_PIXELS = 2**26  # of an enlarged picture: 8192²
MOST_PASSES = 3  # of a network over a picture, as AUTOMATIC1111 bounds them; resampling does the rest
TILE = 256  # pixels of a side that a network sees at once, beside the margin
MARGIN = 32  # pixels around it that are thrown away: near its edges a tile is not what the whole would be


def _ignore() -> None:
    pass


class Enlarger:
    """A network that enlarges pictures by `scale`. Loaded for one request, and gone with it."""

    def __init__(self, name: str, network: Any) -> None:
        self.name = name
        self.scale = int(network.scale)
        self._network = network
        self._tiled = network.tiling == type(network.tiling).SUPPORTED

    def __call__(
        self, image: Image.Image, device: torch.device | str, on_tile: Callable[[], None] = _ignore
    ) -> Image.Image:
        """`image`, RGB, `scale` times as wide and high. What `on_tile` raises passes. Raises UpscalerFailed."""
        import numpy as np
        import torch
        from PIL import Image

        network = self._network.to(device).eval()
        pixels = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None] / 255  # (1, 3, H, W), 0 … 1
        with quiet(), torch.no_grad():
            enlarged = self._in_tiles(pixels, on_tile) if self._tiled else network(pixels)
        if not self._tiled:
            on_tile()
        if not finite.is_finite([enlarged]):
            raise UpscalerFailed(f"The upscaler {self.name} made numbers that are none: its file is damaged.")
        levels = (enlarged[0] * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).contiguous()
        return Image.fromarray(levels.numpy())

    def tiles(self, width: int, height: int) -> int:
        """How many a picture of so many pixels is enlarged in."""
        return math.ceil(width / TILE) * math.ceil(height / TILE) if self._tiled else 1

    def _in_tiles(self, pixels: Tensor, on_tile: Callable[[], None]) -> Tensor:
        height, width = pixels.shape[-2:]
        scale = self.scale
        whole = pixels.new_empty(1, 3, height * scale, width * scale)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                bottom, right = min(top + TILE, height), min(left + TILE, width)
                above, before = min(MARGIN, top), min(MARGIN, left)
                seen = pixels[:, :, top - above : bottom + MARGIN, left - before : right + MARGIN]
                tile = self._network(seen)[:, :, above * scale :, before * scale :]
                target = whole[:, :, top * scale : bottom * scale, left * scale : right * scale]
                target.copy_(tile[:, :, : target.shape[2], : target.shape[3]])
                on_tile()
        return whole


def enlarged(work: Enlargement, device: str, on_tile: Callable[[int, int], None]) -> list[Image.Image]:
    """The pictures of `work`. `on_tile` hears how many tiles of how many a network is done with; what it raises passes.

    Raises UpscalerFailed, before anything is computed where a file or a size is at fault.
    """
    from PIL import Image

    upscalers = [load(one) if isinstance(one, Upscaler) else one for one in work.upscalers]
    if not upscalers:
        return list(work.pictures)
    total = sum(_tiles(one, picture.size, work.target(picture)) for picture in work.pictures for one in upscalers)
    done = itertools.count(1)
    made = []
    for picture in work.pictures:
        target = work.target(picture)
        first, *others = (_to(target, picture, one, device, lambda: on_tile(next(done), total)) for one in upscalers)
        for other in others:
            first = Image.blend(first, other, work.blend)
        made.append(_cut(first, work.size) if work.size is not None and work.crop else first)
    return made


def _to(
    target: tuple[int, int],
    picture: Image.Image,
    upscaler: Enlarger | ResamplingName,
    device: str,
    on_tile: Callable[[], None],
) -> Image.Image:
    """A network may have to pass more than once; what it makes is resampled to `target`."""
    from PIL import Image

    if upscaler == "Nearest":
        return picture.resize(target, Image.Resampling.NEAREST)
    if isinstance(upscaler, Enlarger):
        for _ in _passes(upscaler, picture.size, target):
            picture = upscaler(picture, device, on_tile)
    return picture.resize(target, Image.Resampling.LANCZOS)


def _passes(enlarge: Enlarger, size: tuple[int, int], target: tuple[int, int]) -> Sequence[tuple[int, int]]:
    """The sizes at which the network sees a picture on its way to `target`. Raises UpscalerFailed."""
    seen: list[tuple[int, int]] = []
    while not seen or (len(seen) < MOST_PASSES and (size[0] < target[0] or size[1] < target[1])):
        seen.append(size)
        size = enlarge.scale * size[0], enlarge.scale * size[1]
        if size[0] * size[1] > MOST_PIXELS:
            raise UpscalerFailed(
                f"{enlarge.name} would enlarge the picture to {size[0]}×{size[1]} pixels on its way, more than "
                f"{MOST_PIXELS} in all. Send a smaller picture."
            )
    return seen


def _tiles(upscaler: Enlarger | ResamplingName, size: tuple[int, int], target: tuple[int, int]) -> int:
    return sum(upscaler.tiles(*one) for one in _passes(upscaler, size, target)) if isinstance(upscaler, Enlarger) else 0


def _cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def load(upscaler: Upscaler) -> Enlarger:
    """The network of the upscaler's safetensors file, on the CPU. Raises UpscalerFailed."""
    from safetensors.torch import load_file

    name, file = upscaler.name, upscaler.path
    try:
        import spandrel
    except Exception as missing:  # noqa: BLE001  # also what a torchvision for another build of torch raises
        raise UpscalerFailed(
            f"Upscalers need the packages of the extra `upscale`, which the server's operator can install: "
            f"{first_line(missing)}"
        ) from None
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 30} GiB")
        network = spandrel.ModelLoader().load_from_state_dict(load_file(file))
    except spandrel.UnsupportedModelError:
        raise UpscalerFailed(f"{name} is no upscaler that spandrel knows, such as ESRGAN or SPAN.") from None
    except Exception as error:  # noqa: BLE001  # whatever safetensors, torch and spandrel make of a broken file
        raise UpscalerFailed(f"The upscaler {name} cannot be read: {first_line(error)}") from None
    channels = (network.input_channels, network.output_channels)
    if not isinstance(network, spandrel.ImageModelDescriptor) or network.scale < 2 or channels != (3, 3):
        raise UpscalerFailed(f"{name} does not enlarge colour pictures: it is a network for another purpose.")
    return Enlarger(name, network)
