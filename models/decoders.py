"""Clean latents to small pictures, cheaply: for previews.

Which decoder: the model's own where that is small; a distilled one (Bohan 2023, "TAESD") where one lies in the folder
`taesd` beside the model's components; else a linear map from latent channels to colours, fitted to the model's encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .autoencoder import decoded, encoded
from .libraries import quiet

SMALL_DECODER = 2_000_000  # parameters
FOLDER = "taesd"
_LATENTS = 64  # a side of the picture that the linear map is fitted to
_CONTRAST = 0.5  # its standard deviation, of -1 … 1

Decoder = Callable[[Tensor], Tensor]
"""Clean latents (1, channels, height, width) as the denoiser has them → pixels (1, 3, h, w), -1 … 1."""


class Encoded(Protocol):
    """What a decoder is made of: a model's autoencoder, and the way between its latents and the denoiser's."""

    pipeline: Any

    @property
    def device(self) -> torch.device: ...

    def decodable(self, grid: Tensor) -> Tensor: ...

    def encoded(self, latents: Tensor) -> Tensor: ...


def decoder_of(model: Encoded, source: object) -> Decoder:
    """The cheapest that there is for the latents of a model that was loaded from `source`."""
    vae, device = model.pipeline.vae, model.device
    folder = source / FOLDER if isinstance(source, Path) else None
    if folder is not None and folder.is_dir():
        from diffusers import AutoencoderTiny

        tiny = AutoencoderTiny.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        tiny = tiny.to(device=device, dtype=vae.dtype).eval()
        return lambda clean: tiny.decode(clean.to(tiny.dtype), return_dict=False)[0]
    if sum(parameter.numel() for parameter in vae.decoder.parameters()) > SMALL_DECODER:
        return linear(model)
    return lambda clean: decoded(vae, model.decodable(clean))


def linear(model: Encoded) -> Decoder:
    """Colours as an affine function of each latent's channels: the least-squares fit to one encoded picture.

    The picture is noise whose amplitudes fall with the frequency, as those of photographs do (Field 1987): flat colours
    are nothing that an autoencoder was trained on.
    """
    vae, factor, device = model.pipeline.vae, model.pipeline.vae_scale_factor, model.device
    side = _LATENTS * factor
    frequencies = torch.fft.fftfreq(side)[:, None].square() + torch.fft.fftfreq(side).square()
    spectrum = torch.fft.fft2(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)))
    picture = torch.fft.ifft2(spectrum / frequencies.clamp(min=1 / side**2).sqrt()).real
    picture = (picture * (_CONTRAST / picture.std())).clamp(-1, 1)
    dtype = vae.dtype
    with quiet():
        try:
            vae.to(dtype=torch.float32)  # Stable Diffusion XL's encoder overflows in half precision
            clean = encoded(vae, picture.to(device))  # (1, channels, latents, latents)
        finally:
            vae.to(dtype=dtype)
    clean = model.encoded(clean)
    inputs = clean[0].flatten(1).T.cpu()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)  # (latents², channels + 1)
    colours = torch.nn.functional.avg_pool2d(picture, factor)[0].flatten(1).T  # (latents², 3)
    weights: Tensor = torch.linalg.lstsq(inputs, colours).solution.to(clean)

    def decode(clean: Tensor) -> Tensor:
        result: Tensor = torch.einsum("bchw,cr->brhw", clean.float(), weights[:-1])
        return result + weights[-1].view(1, 3, 1, 1)

    return decode
