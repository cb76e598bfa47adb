"""A fitted forecast: reused calls run no layer, and every call answers a weighted sum of what was computed by then.

The weights are numbers, found beforehand for a model, sampler and number of steps: those with which the sampler's
latents stay nearest to an uncached run's, by least squares over a few pictures (`cache/tuning/fitting.py`). They
forecast and repay at once. Such a run is a linear solver of its own, of fewer steps and with free coefficients (Shaul
et al. 2024, "Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models", arXiv:2403.01329, who
find them by gradients).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cache.report import CacheReport

from .settings import Settings

if TYPE_CHECKING:
    from cache.views.base import Denoiser

__all__ = ["FittedForecast"]


class FittedForecast(Settings):
    __doc__ = Settings.__doc__
    __slots__ = ()

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """One run of `denoiser`, which should be one that the weights were fitted for.

        Raises IncompatibleDenoiser and AlreadyAttached.
        """
        from .run import FittedRun  # torch, where it is needed

        run = FittedRun(self, denoiser)
        with run.attached():
            yield run.report
            run.explain()
