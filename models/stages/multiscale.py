"""Some steps at a reduced latent size, inside of the first run.

The sampler stays at full size, so that every scheduler works as it is: the denoiser is shown a smaller picture, and its
estimate of the clean latents is enlarged. What is shown is the low-frequency part of the latents' orthonormal cosine
transform. There white noise stays white, while the picture, whose weight lies in those frequencies, gains by 1 / factor
in amplitude: the small picture is less noisy than the large one, and the denoiser is called with the timestep of that
level (the shift of Hoogeboom et al. 2023, "simple diffusion", and Esser et al. 2024, section 5.3.2). The frequencies
that the small picture lacks are taken from the last estimate at full size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cache.patching import shadowed
from cache.prediction import Prediction
from cache.transfer import upload
from models.base import Multiscale
from models.run import Run

from .model import Model

EVERY = 4  # with `intermittent`, each so-many-th step between the ends is at full size


def is_reduced(settings: Multiscale, step: int, steps: int) -> bool:
    """Whether step `step` of `steps`, counted from 0, runs at the reduced size."""
    if settings.factor == 1 or step < settings.fullres_start or step >= steps - settings.fullres_end:
        return False
    return not settings.intermittent or (step - settings.fullres_start) % EVERY != EVERY - 1


@dataclass(slots=True)
class Scales:
    """The sizes of one run.

    letters: F or S for each call of the denoiser, at full size or small. share: of a full call's latents that a small
    one has.
    """

    model: Model
    settings: Multiscale
    run: Run
    prediction: Prediction
    letters: str = ""
    share: float = 1.0
    details: dict[str | None, Tensor] = field(default_factory=dict)
    bases: tuple[Tensor, Tensor] | None = None  # the reduced size's, for both sides: (height', height), (width', width)

    @contextmanager
    def attached(self) -> Iterator[Scales]:
        """Within the context, the denoiser's calls are at the size that their step has; a cache is attached before.

        So the cache sees the calls as they are made, the small ones and the large ones.
        """
        root = self.model.denoiser.root
        forward = root.forward

        def rescaled(*args: Any, **kwargs: Any) -> Any:
            return self._call(forward, args, kwargs)

        try:
            with shadowed([(root, "forward", rescaled)]):
                yield self
        finally:
            self.details.clear()

    def _call(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layout, prediction, (height, width) = self.model.layout, self.prediction, self.run.grid
        latents, timestep = layout.input_of(args, kwargs)
        grid, level = layout.grid(latents, height, width), prediction.at(timestep)
        name = getattr(forward, "lane", None)  # conditional and unconditional, where they are called apart
        if self.bases is None:
            self.bases = self._bases(grid)
        down, across = self.bases
        if not is_reduced(self.settings, self.run.done, self.run.steps):
            output = forward(*args, **kwargs)
            self._note("F")
            if is_reduced(self.settings, self.run.done + 1, self.run.steps):
                clean = prediction.clean(grid, layout.grid(output[0], height, width), level)
                self.details[name] = clean - down.T @ (down @ clean @ across.T) @ across
            return output
        small_height, small_width = len(down), len(across)
        self.share = small_height * small_width / (height * width)
        gain = math.sqrt(self.share)
        below = prediction.of_ratio(gain * level.sigma / level.alpha)
        small = (gain * below.alpha / level.alpha) * (down @ grid @ across.T)
        args, kwargs = layout.with_input(args, kwargs, small, below.timestep)
        output = forward(*args, **kwargs)
        self._note("S")
        clean = prediction.clean(small, layout.grid(output[0], small_height, small_width), below)
        clean = down.T @ (clean / gain) @ across
        if name in self.details:
            clean = clean + self.details[name]
        return (layout.flat(prediction.output(grid, clean, level)),)

    def _note(self, letter: str) -> None:
        """A call of that size has come back; guidance may have spared the denoiser of it."""
        self.letters = self.letters.ljust(len(self.run.report.decisions), letter)

    def _bases(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        multiple = self.model.layout.multiple
        sizes = [max(1, round(side * self.settings.factor / multiple)) * multiple for side in self.run.grid]
        rows = (low_frequencies(side, size).to(grid.dtype) for side, size in zip(self.run.grid, sizes, strict=True))
        down, across = (upload(one, grid.device) for one in rows)
        return down, across


@lru_cache(maxsize=16)
def low_frequencies(side: int, size: int) -> Tensor:
    """(size, side), float32: orthonormal rows that take `side` samples to their `size` lowest frequencies' samples."""
    return (_cosines(size).T @ _cosines(side)[:size]).float()


def _cosines(side: int) -> Tensor:
    """The orthonormal cosine transform of type 2, a row a frequency."""
    frequency, sample = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    cosines = torch.cos(math.pi / side * (sample + 0.5) * frequency) * math.sqrt(2 / side)
    cosines[0] /= math.sqrt(2)
    return cosines
