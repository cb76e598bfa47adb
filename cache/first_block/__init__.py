"""First-block cache: skip a transformer's remaining blocks while the first one says that little has changed.

The rule of ParaAttention and of diffusers' `FirstBlockCacheConfig`: with r = block_0(x) - x for the image stream, a
call reuses if mean|r - r_prev| / mean|r_prev| < threshold, r_prev being that of the last computed call. It then answers
with the streams after the first block plus what all remaining blocks added to them at that computed call, or a forecast
of it from the last ones. Without a forecast bit-equal to diffusers' hook for one item; the items of a batch decide each
for itself.

With a forecast the first block says more than yes or no: how far along the line through its last two computed values
its residual has moved. The other blocks' residuals are taken as far along theirs, and what is held against the
threshold is how far r lies beside its line, summed over the calls since the last computed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cache.errors import IncompatibleDenoiser
from cache.report import CacheReport

from .settings import Settings

if TYPE_CHECKING:
    from cache.views.base import Denoiser

__all__ = ["FirstBlockCache"]


class FirstBlockCache(Settings):
    __doc__ = Settings.__doc__
    __slots__ = ()

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """One run of `denoiser`, a transformer's view. Raises IncompatibleDenoiser and AlreadyAttached."""
        from cache.views.transformer import TransformerDenoiser  # torch, where it is needed

        from .run import FirstBlockRun

        if not isinstance(denoiser, TransformerDenoiser):
            raise IncompatibleDenoiser(
                f"The first-block cache needs a transformer, and {type(denoiser.root).__name__} is a UNet: "
                "use DeepCache for it."
            )
        run = FirstBlockRun(self, denoiser)
        with run.attached():
            yield run.report
            run.conclude()
