"""A decoder of four times the resolution, for a model that draws small.

It is the model's own decoder, trained on, with another end: so that it sees what lies behind a soft edge, which an
enlarger of the decoded picture does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from cache.patching import shadowed

from .libraries import quiet

SCALE = 4
WEIGHTS = "diffusion_pytorch_model.safetensors"  # beside config.json, the autoencoder's
_WIDTH = 64  # channels of the end
_AROUND = 16  # pixels of the small picture: wider than its edges are soft


class FineEnd(nn.Module):
    """In place of a decoder's last convolution: (n, channels, h, w) → pixels (n, 3, SCALE × h, SCALE × w), -1 … 1.

    A colour a feature, as before, and what is to be added to each of the SCALE² pixels that it becomes (Shi et al.
    2016, "sub-pixel convolution").
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.colours = nn.Conv2d(channels, 3, 3, padding=1)
        layers: list[nn.Module] = []
        for taken in (channels, _WIDTH, _WIDTH):
            layers += [nn.Conv2d(taken, _WIDTH, 3, padding=1), nn.PReLU(_WIDTH)]
        self.details = nn.Sequential(*layers, nn.Conv2d(_WIDTH, 3 * SCALE**2, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        near = functional.interpolate(self.colours(features), scale_factor=SCALE, mode="nearest")
        return near + functional.pixel_shuffle(self.details(features), SCALE)


def build(config: Any) -> AutoencoderKL:
    """An untrained one for the latents of autoencoders with that configuration; it cannot encode."""
    coder = AutoencoderKL.from_config(config)
    del coder.encoder, coder.quant_conv
    coder.decoder.conv_out = FineEnd(coder.decoder.conv_out.in_channels)
    return coder


@lru_cache(maxsize=2)
def load(folder: Path, device: torch.device) -> AutoencoderKL:
    """The one of a folder, float32. Small, and kept."""
    with quiet():
        coder = build(AutoencoderKL.load_config(folder))
    coder.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
    return coder.to(device, memory_format=torch.channels_last).eval()


def lit_as(small: Tensor, large: Tensor) -> Tensor:
    """`large`, (n, 3, SCALE × h, SCALE × w), with the mean colours that `small` has around each place.

    A decoder that was trained for its edges drifts in what nobody sees on an edge.
    """
    known, made = (
        functional.avg_pool2d(pixels, side, ceil_mode=True, count_include_pad=False)
        for pixels, side in ((small, _AROUND), (large, SCALE * _AROUND))
    )
    return large + functional.interpolate(known - made, large.shape[-2:], mode="bilinear")


@contextmanager
def decoding(vae: Any, folder: Path | None, device: torch.device) -> Iterator[None]:
    """Within the context `vae` decodes as the fine decoder in `folder` does, in the light of its own pictures.

    Picture by picture, in float32. None: as ever.
    """
    if folder is None:
        yield
        return
    fine, plain = load(folder, device), vae.decode

    def decode(latents: Tensor, **_: Any) -> tuple[Tensor]:
        (small,) = plain(latents, return_dict=False)
        large = torch.cat([fine.decode(one[None].to(fine.dtype)).sample for one in latents])
        return (lit_as(small.to(fine.dtype), large),)

    with shadowed([(vae, "decode", decode)]):
        yield
