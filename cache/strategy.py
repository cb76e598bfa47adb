"""What a cache is to its user: a strategy, which is attached for one run and reports what that run did.

A strategy is a frozen setting without state. Torch is not imported here, nor by the strategies' settings, so that a
process that only validates settings can build them and send them to the one that owns the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .report import CacheReport

if TYPE_CHECKING:
    from .views.base import Call, Denoiser


class CacheStrategy(Protocol):
    """A way to save denoiser calls: frozen settings and the behaviour that goes with them."""

    name: ClassVar[str]

    def attach(self, denoiser: Denoiser) -> AbstractContextManager[CacheReport]:
        """Act on every call of `denoiser` inside the context, which is one run; then restore it exactly.

        Raises IncompatibleDenoiser and AlreadyAttached on entering.
        """
        ...


@dataclass(frozen=True, slots=True)
class NoCache:
    """Every call computes. The calls are counted, so that a report always has the same fields."""

    name: ClassVar[str] = "none"

    @contextmanager
    def attach(self, denoiser: Denoiser) -> Iterator[CacheReport]:
        from .run import accounted

        report = CacheReport(self.name)

        def count(call: Call) -> Any:
            output = call.run()
            report.record((True,))
            return output

        with accounted(denoiser, report), denoiser.intercepted(count):
            yield report
