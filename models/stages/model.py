"""What stages need of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from PIL import Image

from cache import CacheStrategy, Denoiser
from cache.prediction import Prediction
from models.base import GenerationParams, ModelSpec
from models.decoders import Decoder
from models.layout import Layout
from models.run import Begun, Run


class Sizes(Protocol):
    """At which sizes, and in how many steps, a model draws."""

    spec: ModelSpec

    @property
    def size_multiple(self) -> int: ...

    @property
    def native_pixels(self) -> int: ...

    def partial_steps(self, steps: int, strength: float) -> int: ...

    def steps_before(self, params: GenerationParams, strength: float, until: float) -> int: ...


class Model(Sizes, Protocol):
    """A model that denoises and decodes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def pipeline(self) -> Any: ...

    @property
    def denoiser(self) -> Denoiser: ...

    @property
    def layout(self) -> Layout: ...

    def prediction(self, scheduler: Any) -> Prediction: ...

    @property
    def preview_decoder(self) -> Decoder: ...

    @property
    def tiled(self) -> bool: ...

    def run(
        self,
        params: GenerationParams,
        seeds: tuple[int, ...],
        strategy: CacheStrategy,
        size: tuple[int, int],
        pictures: Sequence[Image.Image] = (),
        strength: float = 1.0,
        until: float = 1.0,
        begun: Begun | None = None,
        mask: Image.Image | None = None,
    ) -> AbstractContextManager[Run]: ...

    def decode(self, latents: torch.Tensor, width: int, height: int) -> list[Image.Image]: ...
