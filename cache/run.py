"""The state of a run: its lanes, the numbers of their calls and what they keep, gone with whatever ends it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .report import CacheReport
from .solver import Correction, Ledger
from .views.base import Call, Decision, Denoiser


@dataclass(slots=True)
class Lane:
    """The calls with text, those without, or those with both halves in one batch.

    size: the signature of the present call. follows: whether the call before had it too. kept: by size, what the
    strategy carries from call to call; it knows its `bytes`.
    """

    calls: int = 0  # before the present one, at all sizes
    size: tuple[Any, ...] | None = None
    follows: bool = False
    kept: dict[tuple[Any, ...] | None, Any] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def bytes(self) -> int:
        kept: int = sum(one.bytes for one in self.kept.values())
        return self.ledger.bytes + kept


class Run(ABC):
    """One run of a denoiser under a strategy, whose own run says in `step` what becomes of a call.

    Raises IncompatibleDenoiser.
    """

    def __init__(self, denoiser: Denoiser, report: CacheReport, *, corrects: bool) -> None:
        denoiser.check_is_not_compiled()
        self.denoiser, self.report = denoiser, report
        self.lanes: dict[str | None, Lane] = {}
        self._correction = Correction(denoiser.responses) if corrects else None
        report.settings["correction"] = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context, the denoiser's calls are this run's."""
        try:
            with self.denoiser.intercepted(self.handle):
                yield
        finally:
            self.lanes.clear()

    def handle(self, call: Call) -> Any:
        if call.lane not in self.lanes:
            # Guidance may begin within a run: a lane then counts on from the step that the others were called for.
            self.lanes[call.lane] = Lane(max((other.calls for other in self.lanes.values()), default=1) - 1)
        lane, size = self.lanes[call.lane], call.signature
        lane.follows, lane.size = lane.size == size, size
        try:
            output, decision = self.step(call, lane)
            if self._correction is not None:
                output = self._correction.after(lane.calls, decision, output, lane.ledger)
                self.report.settings["correction"] = self._correction.acted
        except BaseException:  # also a cancel: whatever stopped the call, what it leaves is not to be reused
            self.lanes.clear()
            raise
        lane.calls += 1
        self.report.record(self.denoiser.of_pictures(decision, max))  # computed, if either half was
        self.report.cache_bytes = max(self.report.cache_bytes, sum(one.bytes for one in self.lanes.values()))
        return output

    def ends(self, lane: Lane) -> bool:
        """Whether the lane's present call, which is not its first, is known to be the run's last.

        Known where computed calls repay, since nothing later repays a reused last one: what it answers is the picture.
        """
        return self._correction is not None and self._correction.ends_with(lane.calls)

    @abstractmethod
    def step(self, call: Call, lane: Lane) -> tuple[Any, Decision]:
        """The denoiser's answer, computed or reused, and which it was."""
