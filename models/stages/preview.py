"""Small pictures of how far the latents have come: the scheduler's own estimate of the clean ones, cheaply decoded.

Which decoder: the model's own where that is small; a distilled one (Bohan 2023, "TAESD") where one lies in the folder
`taesd` beside the model's components; else a linear map from latent channels to colours, fitted to the model's encoder.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from cache.patching import shadowed
from cache.prediction import FlowMatching, prediction_of
from models.libraries import quiet

if TYPE_CHECKING:
    from models.pipeline import PipelineModel

LONGEST_SIDE = 256  # pixels
PICTURES = 5  # of a run, about
SMALL_DECODER = 2_000_000  # parameters
FOLDER = "taesd"
_QUALITY = 80
_LATENTS = 64  # a side of the picture that the linear map is fitted to
_CONTRAST = 0.5  # its standard deviation, of -1 … 1

Decoder = Callable[[Tensor], Tensor]
"""Clean latents (1, channels, height, width) as the denoiser has them → pixels (1, 3, h, w), -1 … 1."""


class Previews:
    """The previews of one run. Off, it costs nothing."""

    def __init__(self, decoder: Decoder | None, steps: int) -> None:
        self._decoder = decoder
        self._every = max(1, steps // PICTURES)
        self._estimate: Tensor | None = None

    @contextmanager
    def watching(self, model: PipelineModel, scheduler: Any, height: int, width: int) -> Iterator[Previews]:
        """Within the context, each step of `scheduler` leaves its estimate of the first image's clean latents here.

        height, width: of the latents' grid.
        """
        if self._decoder is None:
            yield self
            return
        prediction = prediction_of(scheduler)
        flow = isinstance(prediction, FlowMatching)
        step = scheduler.step

        @functools.wraps(step)  # pipelines read the signature
        def watched(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if flow:
                x, level = sample[:1], prediction.at(float(timestep) / scheduler.config.num_train_timesteps)
            else:
                x, level = scheduler.scale_model_input(sample, timestep)[:1], prediction.at(float(timestep))
            self._estimate = model.layout.grid(prediction.clean(x, model_output[:1], level), height, width)
            return step(model_output, timestep, sample, *args, **kwargs)

        try:
            with shadowed([(scheduler, "step", watched)]):
                yield self
        finally:
            self._estimate = None

    def after(self, done: int) -> bytes | None:
        """A JPEG of the run's first image after `done` steps, if one is due."""
        if self._decoder is None or self._estimate is None or (done - 1) % self._every:
            return None
        pixels = self._decoder(self._estimate)[0].clamp(-1, 1)
        levels = ((pixels + 1) * 127.5).round().to("cpu", torch.uint8).permute(1, 2, 0).contiguous()
        picture = Image.fromarray(levels.numpy())
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue()


def decoder_of(model: PipelineModel) -> Decoder:
    """The cheapest decoder that there is for the model's latents."""
    vae = model.pipeline.vae
    folder = model.spec.source / FOLDER if isinstance(model.spec.source, Path) else None
    if folder is not None and folder.is_dir():
        from diffusers import AutoencoderTiny

        tiny = AutoencoderTiny.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        tiny = tiny.to(device=model.device, dtype=vae.dtype).eval()
        return lambda clean: tiny.decode(clean.to(tiny.dtype), return_dict=False)[0]
    if sum(parameter.numel() for parameter in vae.decoder.parameters()) > SMALL_DECODER:
        return linear(model)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return lambda clean: vae.decode(clean / scale + shift, return_dict=False)[0]


def linear(model: PipelineModel) -> Decoder:
    """Colours as an affine function of each latent's channels: the least-squares fit to one encoded picture.

    The picture is noise whose amplitudes fall with the frequency, as those of photographs do (Field 1987): flat colours
    are nothing that an autoencoder was trained on.
    """
    vae, factor = model.pipeline.vae, model.pipeline.vae_scale_factor
    side = _LATENTS * factor
    frequencies = torch.fft.fftfreq(side)[:, None].square() + torch.fft.fftfreq(side).square()
    spectrum = torch.fft.fft2(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)))
    picture = torch.fft.ifft2(spectrum / frequencies.clamp(min=1 / side**2).sqrt()).real
    picture = (picture * (_CONTRAST / picture.std())).clamp(-1, 1)
    dtype = vae.dtype
    with quiet():
        try:
            vae.to(dtype=torch.float32)  # Stable Diffusion XL's encoder overflows in half precision
            clean = vae.encode(picture.to(model.device)).latent_dist.mode()  # (1, channels, latents, latents)
        finally:
            vae.to(dtype=dtype)
    clean = (clean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    inputs = clean[0].flatten(1).T.cpu()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)  # (latents², channels + 1)
    colours = torch.nn.functional.avg_pool2d(picture, factor)[0].flatten(1).T  # (latents², 3)
    weights: Tensor = torch.linalg.lstsq(inputs, colours).solution.to(clean)

    def decode(clean: Tensor) -> Tensor:
        result: Tensor = torch.einsum("bchw,cr->brhw", clean.float(), weights[:-1])
        return result + weights[-1].view(1, 3, 1, 1)

    return decode
