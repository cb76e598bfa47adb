"""The families of models by name, one a file: data, loader, what differs from the others."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from models.base import UNWATCHED, CacheName, LoadHooks, ModelSpec

from .flux import FLUX, FLUX_DEV, FLUX_SCHNELL
from .sd import SD, SD15, SD21
from .sdxl import SDXL

if TYPE_CHECKING:
    import torch

    from models.pipeline import PipelineModel


class ModelFamily(Protocol):
    """One architecture: its data, its loader. Stateless."""

    @property
    def name(self) -> str: ...

    @property
    def native_size(self) -> int:
        """Pixels of a side of the square that the family was trained at."""
        ...

    @property
    def size_multiple(self) -> int: ...

    @property
    def cache(self) -> CacheName:
        """The cache that acts on this family's denoiser."""
        ...

    @property
    def steps(self) -> int: ...

    @property
    def guidance_scale(self) -> float: ...

    @property
    def samplers(self) -> Mapping[str, tuple[str, ...]]:
        """Sampler name → names of the schedulers it can be paired with."""
        ...

    def reuse_costs(self, spec: ModelSpec) -> tuple[float, ...]:
        """Floating-point operations of a reuse step at each branch, as shares of a full step, without the weights.

        Empty where the cache has no branches. Raises LoadFailed.
        """
        ...

    def load(
        self, spec: ModelSpec, device: str, dtype: torch.dtype | None = None, hooks: LoadHooks = UNWATCHED
    ) -> PipelineModel:
        """`dtype` None: the spec's, else the one that suits the device. Raises LoadFailed."""
        ...


_ALL: tuple[ModelFamily, ...] = (SD, SD15, SD21, SDXL, FLUX, FLUX_SCHNELL, FLUX_DEV)
FAMILIES: Mapping[str, ModelFamily] = MappingProxyType({family.name: family for family in _ALL})
