"""Small pictures of how far the latents have come: the scheduler's own estimate of the clean ones, cheaply decoded."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cache.patching import shadowed
from cache.prediction import FlowMatching, prediction_of
from models.decoders import Decoder
from models.layout import Layout
from models.run import Run

LONGEST_SIDE = 256  # pixels
PICTURES = 5  # of a run, about
_QUALITY = 80


class Previews:
    """The previews of one run. Off, it costs nothing."""

    def __init__(self, decoder: Decoder | None, steps: int) -> None:
        self._decoder = decoder
        self._every = max(1, steps // PICTURES)
        self._estimate: Tensor | None = None

    @contextmanager
    def watching(self, run: Run, layout: Layout) -> Iterator[Previews]:
        """Within the context, each step of `run` leaves its estimate of the first image's clean latents here."""
        if self._decoder is None:
            yield self
            return
        scheduler, prediction = run.scheduler, prediction_of(run.scheduler)
        flow = isinstance(prediction, FlowMatching)
        step = scheduler.step

        @functools.wraps(step)  # pipelines read the signature
        def watched(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if flow:
                x, level = sample[:1], prediction.at(float(timestep) / scheduler.config.num_train_timesteps)
            else:
                x, level = scheduler.scale_model_input(sample, timestep)[:1], prediction.at(float(timestep))
            self._estimate = layout.grid(prediction.clean(x, model_output[:1], level), *run.grid)
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
