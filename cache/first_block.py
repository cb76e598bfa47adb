"""First-block cache: skip a transformer's remaining blocks while the first one says that little has changed.

The rule of ParaAttention and of diffusers' `FirstBlockCacheConfig`: with r = block_0(x) - x for the image stream, a
call reuses if mean|r - r_prev| / mean|r_prev| < threshold, r_prev being that of the last computed call. It then answers
with the streams after the first block plus what all remaining blocks added to them at that computed call, or a forecast
of it from the last ones. Without a forecast bit-equal to diffusers' hook for one item; the items of a batch decide each
for itself.

The forecast `probe`, the default, lets the first block say more than yes or no: how far along the line through its last
two computed values its residual has moved. The other blocks' residuals are taken as far along theirs, and what is held
against the threshold is how far r lies beside its line, summed over the calls since the last computed one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from . import forecast as forecasts
from .strategy import CacheReport, IncompatibleDenoiser

if TYPE_CHECKING:
    from .denoiser import Denoiser


@dataclass(frozen=True, slots=True)
class FirstBlockCache:
    """Run the first block; skip the others while its residual differs by less than `threshold` from the kept one.

    threshold: relative mean absolute difference, 0 to 1; 0 never reuses, published settings lie between .03 and .15.
    max_consecutive: the most calls in a row that may reuse; None for no cap.
    forecast: what a reuse call takes for the remaining blocks' residuals: `none` their last values, `linear` and
        `quadratic` a polynomial through the last two or three, `damped` a cautious line (`cache/forecast.py`); `probe`
        a line as far as the first block's residual has moved along its own, and the threshold bounds the sum of what
        that residual leaves unexplained.
    correction: whether a computed call also repays what the reused ones before it got wrong (`cache/correction.py`),
        for a sampler that the view knows; None: with any forecast but `none`.
    The decision is the host's: a call waits for a GPU once, with `probe` twice.
    """

    name: ClassVar[str] = "first_block"

    threshold: float = 0.05
    max_consecutive: int | None = None
    forecast: forecasts.Forecast = "probe"
    correction: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise ValueError(f"threshold must be a number from 0 to 1, not {self.threshold!r}.")
        if not 0 <= self.threshold <= 1:  # false for NaN as well
            raise ValueError(f"threshold must lie between 0 (never reuse) and 1, not at {self.threshold}.")
        if self.max_consecutive is not None and (type(self.max_consecutive) is not int or self.max_consecutive < 1):
            raise ValueError(f"max_consecutive must be 1 or more, or None for no cap, not {self.max_consecutive!r}.")
        forecasts.check(self.forecast)

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        """One run of `denoiser`, a transformer's view. Raises IncompatibleDenoiser and AlreadyAttached."""
        from .correction import Correction, wanted  # torch, where it is needed
        from .denoiser import TransformerDenoiser
        from .residual import ResidualRun

        if not isinstance(denoiser, TransformerDenoiser):
            raise IncompatibleDenoiser(
                f"The first-block cache needs a transformer, and {type(denoiser.root).__name__} is a UNet: "
                "use DeepCache for it."
            )
        report = CacheReport(self.name, settings={**dataclasses.asdict(self), "correction": False})
        run = ResidualRun(denoiser, report, self)
        correction = Correction(denoiser, report)
        corrects = wanted(self.correction, self.forecast) and self.threshold > 0
        with denoiser.intercepted(correction.around(run.handle) if corrects else run.handle):
            try:
                yield report
                correction.explain(self.correction is True)
                report.reuse_cost = run.reuse_cost()
                report.conclude(partial(self._explain, sum(map(len, denoiser.blocks))))
            finally:
                run.passes.clear()

    def _explain(self, blocks: int, report: CacheReport) -> None:
        """Warn of whatever kept the cache from acting as asked."""
        calls = len(report.decisions)
        changes = [change for change in report.residuals if change is not None and math.isfinite(change)]
        if self.threshold == 0:
            report.warn("The first-block cache with threshold 0 computes every call: use a threshold above 0.")
        elif blocks < 2:
            report.warn("The transformer has a single block, so the first-block cache has nothing to skip.")
        elif calls < 2:
            report.warn(
                f"The first-block cache had nothing to reuse in a run of {calls} denoiser calls: use more steps."
            )
        elif report.reused == 0 and changes:
            report.warn(
                f"The first-block cache reused nothing: the first block's residual changed by {min(changes):.3f} or "
                f"more at every call, not below the threshold {self.threshold}. A higher threshold would reuse."
            )
        elif report.reused == 0 and not report.warnings:
            report.warn("The first-block cache reused nothing: the inputs changed their shape at every call.")
