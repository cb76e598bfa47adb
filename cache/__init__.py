"""Feature caches for diffusion models: reuse between denoising steps, attached to one run at a time.

    with attach(pipe, DeepCache(interval=3, depth=2)) as report:
        image = pipe("a misty forest at twilight").images[0]
    print(report)

Strategies and reports are plain settings and plain numbers; importing them does not import torch. The views and
`attach` do, on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .deepcache import DeepCache
from .errors import AlreadyAttached, CacheError, IncompatibleDenoiser
from .first_block import FirstBlockCache
from .fitted import FittedForecast
from .report import CacheReport
from .strategy import CacheStrategy, NoCache

if TYPE_CHECKING:
    from .attaching import attach, view_of
    from .views.base import Denoiser, Injector
    from .views.transformer import TransformerDenoiser
    from .views.unet import UNetDenoiser

__all__ = [
    "AlreadyAttached",
    "CacheError",
    "CacheReport",
    "CacheStrategy",
    "DeepCache",
    "Denoiser",
    "FirstBlockCache",
    "FittedForecast",
    "IncompatibleDenoiser",
    "Injector",
    "NoCache",
    "TransformerDenoiser",
    "UNetDenoiser",
    "attach",
    "view_of",
]

_NEEDS_TORCH = {
    "Denoiser": ".views.base",
    "Injector": ".views.base",
    "TransformerDenoiser": ".views.transformer",
    "UNetDenoiser": ".views.unet",
    "attach": ".attaching",
    "view_of": ".attaching",
}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        globals()[name] = value = getattr(import_module(_NEEDS_TORCH[name], __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
