"""Enlarging a picture by a network in the operator's folder: ESRGAN and its like, read by spandrel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import finite
from .base import Upscaler, UpscalerFailed
from .libraries import first_line, quiet

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

MOST_BYTES = 2**30  # of a file; the largest published one has a third of it
TILE = 256  # pixels of a side that a network sees at once, beside the margin
MARGIN = 32  # pixels around it that are thrown away: near its edges a tile is not what the whole would be


class Enlarger:
    """A network that enlarges pictures by `scale`. Loaded for one request, and gone with it."""

    def __init__(self, name: str, network: Any) -> None:
        self.name = name
        self.scale = int(network.scale)
        self._network = network

    def __call__(self, image: Image.Image, device: torch.device) -> Image.Image:
        """`image`, RGB, `scale` times as wide and high. Raises UpscalerFailed."""
        import numpy as np
        import torch
        from PIL import Image

        network = self._network.to(device).eval()
        pixels = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None] / 255  # (1, 3, H, W), 0 … 1
        tiles = network.tiling == type(network.tiling).SUPPORTED
        with quiet():
            enlarged = self._in_tiles(pixels) if tiles else network(pixels)
        if not finite.is_finite([enlarged]):
            raise UpscalerFailed(f"The upscaler {self.name} made numbers that are none: its file is damaged.")
        levels = (enlarged[0] * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).contiguous()
        return Image.fromarray(levels.numpy())

    def _in_tiles(self, pixels: Tensor) -> Tensor:
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
        return whole


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
