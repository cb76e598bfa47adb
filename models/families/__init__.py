"""The families of models by name, one a file: data, loader, what differs from the others."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .chroma import CHROMA
from .family import ModelFamily
from .flux import FLUX, FLUX_DEV, FLUX_FILL, FLUX_SCHNELL
from .flux2 import FLUX2_KLEIN, FLUX2_KLEIN_BASE
from .qwen_image import QWEN_IMAGE
from .sd import SD, SD15, SD21
from .sd3 import SD35
from .sdxl import SDXL, SDXL_REFINER
from .z_image import Z_IMAGE, Z_IMAGE_TURBO

_ALL: tuple[ModelFamily, ...] = (
    *(SD, SD15, SD21, SDXL, SDXL_REFINER),
    *(FLUX, FLUX_SCHNELL, FLUX_DEV, FLUX_FILL, FLUX2_KLEIN, FLUX2_KLEIN_BASE),
    *(SD35, CHROMA, QWEN_IMAGE, Z_IMAGE, Z_IMAGE_TURBO),
)
FAMILIES: Mapping[str, ModelFamily] = MappingProxyType({family.name: family for family in _ALL})
