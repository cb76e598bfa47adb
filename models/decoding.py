"""From latents to pictures: what the autoencoder of a model decodes, in which precision, and in tiles or whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from . import finite
from .base import ModelSpec
from .loading.plan import VAE

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .decoders import Decoder
    from .layout import Layout
    from .loading.residence import Residence

SMALL_TILE = 512  # pixels: for a picture that is no larger than the autoencoder's own tile


class Decoding(ABC):
    """The part of a PipelineModel that has to do with its autoencoder."""

    spec: ModelSpec
    pipeline: Any
    residence: Residence | None

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """How the denoiser's latents lie."""

    @cached_property
    def device(self) -> torch.device:
        """Where the networks compute, wherever their weights rest. Found once: diffusers walks all modules for it."""
        return cast("torch.device", self.pipeline._execution_device)

    def decodable(self, grid: torch.Tensor) -> torch.Tensor:
        """What the autoencoder decodes, of a denoiser's clean latents (B, channels, height, width)."""
        config = self.pipeline.vae.config
        scaled: torch.Tensor = grid / config.scaling_factor
        return scaled if config.shift_factor is None else scaled + config.shift_factor

    def encoded(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `decodable`."""
        config = self.pipeline.vae.config
        shifted = latents if config.shift_factor is None else latents - config.shift_factor
        scaled: torch.Tensor = shifted * config.scaling_factor
        return scaled

    def clean(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """What the autoencoder decodes, of a run's latents for pictures of width × height pixels."""
        factor = self.pipeline.vae_scale_factor
        return self.decodable(self.layout.grid(latents, height // factor, width // factor))

    def decode(self, latents: torch.Tensor, width: int, height: int) -> list[Image.Image]:
        """Pictures of width × height pixels.

        In float32 where the autoencoder's own activations overflow half precision, always (`upcasts`) or in this
        picture. Raises NotFinite.
        """
        import torch

        from . import autoencoder

        def decoded(latents: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W), -1 … 1
            return autoencoder.decoded(vae, self.clean(latents, width, height))

        vae = self.pipeline.vae
        if self.residence is not None:
            self.residence.bring(VAE)  # before it is cast, so that it is cast there
        dtype = vae.dtype
        with self._tiles(width, height):
            pixels = decoded(latents.to(dtype)) if self.decode_dtype == dtype else None
            if pixels is None or (dtype == torch.float16 and not finite.is_finite([pixels])):
                vae.to(dtype=torch.float32)
                try:
                    pixels = decoded(latents.float())
                finally:
                    vae.to(dtype=dtype)
        finite.check([pixels], "The decoded pixels are", self.pipeline, ["vae"])
        return cast("list[Image.Image]", self.pipeline.image_processor.postprocess(pixels, output_type="pil"))

    def _tiles(self, width: int, height: int) -> AbstractContextManager[None]:
        """The autoencoder with tiles for such a picture, should it decode in tiles."""
        from cache.patching import shadowed

        from .autoencoder import tile

        vae = self.pipeline.vae
        own, side = tile(vae), self.tile(width, height)
        if side == own:
            return nullcontext()
        latents = vae.tile_latent_min_size * side // own
        return shadowed([(vae, "tile_sample_min_size", side), (vae, "tile_latent_min_size", latents)])

    @property
    def upcasts(self) -> bool:
        """Whether the autoencoder's decoder is known to overflow half precision."""
        return False

    @property
    def decode_dtype(self) -> torch.dtype:
        """What the autoencoder decodes in: float32 where its own activations overflow half precision (`upcasts`)."""
        import torch

        dtype: torch.dtype = self.pipeline.vae.dtype
        return torch.float32 if dtype == torch.float16 and self.upcasts else dtype

    def decode_bytes(self, width: int, height: int, images: int, *, tiled: bool = False) -> int:
        """Bytes of the device's memory, beside the weights, that decoding so many images takes at least."""
        from .memory import decode_bytes

        if self.spec.vae_tiling or tiled:
            width, height = (min(side, self.tile(width, height)) for side in (width, height))
        images = 1 if self.spec.vae_slicing else images
        return decode_bytes(self.pipeline.vae, width * height * images, self.decode_dtype)

    def tile(self, width: int, height: int) -> int:
        """Pixels of a side of the tiles that such a picture is decoded in."""
        from .autoencoder import tile

        own = tile(self.pipeline.vae)
        return own if max(width, height) > own else min(own, SMALL_TILE)

    @contextmanager
    def decoding(self, *, tiled: bool) -> Iterator[None]:
        """Within the context pictures are decoded in tiles, if `tiled` or the model's own setting says so."""
        if tiled or (self.residence is not None and self.residence.plan.tiled):
            self.pipeline.vae.enable_tiling()
        try:
            yield
        finally:
            self.pipeline.vae.use_tiling = self.spec.vae_tiling

    @property
    def tiled(self) -> bool:
        """Whether the autoencoder works in tiles at present."""
        return bool(self.pipeline.vae.use_tiling)

    @cached_property
    def preview_decoder(self) -> Decoder:
        """Found, or fitted, on the first request with previews."""
        from .decoders import decoder_of

        return decoder_of(self, self.spec.source)
