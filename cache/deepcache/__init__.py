"""DeepCache: most of a UNet's deep features are reused between denoising steps (Ma et al. 2023, arXiv:2312.00858).

A compute call is the whole UNet and keeps one tensor, the hidden state that enters the outermost up-path layers at one
skip branch. A reuse call runs only what lies outside of that branch, on a forecast of that state. Without a forecast,
branch b is bit-equal to the published helper's `cache_branch_id=b`; the helper keeps every layer's output, this keeps
the one that is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cache.errors import IncompatibleDenoiser
from cache.report import CacheReport

from .settings import DEEPEST, Settings

if TYPE_CHECKING:
    from cache.views.base import Denoiser

__all__ = ["DEEPEST", "DeepCache"]


class DeepCache(Settings):
    __doc__ = Settings.__doc__
    __slots__ = ()

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """One run of `denoiser`, which must be a UNet's view. Raises IncompatibleDenoiser and AlreadyAttached."""
        from cache.views.unet import UNetDenoiser  # torch, where it is needed

        from .run import DeepCacheRun

        if not isinstance(denoiser, UNetDenoiser):
            raise IncompatibleDenoiser(
                f"DeepCache needs a UNet, and {type(denoiser.root).__name__} is none: use FirstBlockCache for it."
            )
        run = DeepCacheRun(self, denoiser)
        with run.attached():
            yield run.report
            run.explain()
