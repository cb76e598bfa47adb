"""Models that take their worker down when they are loaded, kept away from the workers for a while."""

from __future__ import annotations

import time
from collections.abc import Mapping

CRASHES = 2  # in a row; one alone may be a stranger's doing, such as a process killed by hand


class Quarantine:
    """`seconds` later a model may be tried again: memory that was short may be there by then."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._crashes: dict[str, int] = {}
        self._held: dict[str, tuple[str, float]] = {}

    def crashed(self, model: str, reason: str) -> bool:
        """A worker was lost while it loaded `model`; `reason` is a sentence for everyone. True: now it is held."""
        self._crashes[model] = self._crashes.get(model, 0) + 1
        if self._crashes[model] < CRASHES:
            return False
        self._held[model] = reason, time.monotonic() + self._seconds
        self._crashes[model] = CRASHES - 1  # when it is tried again, one crash suffices
        return True

    def loaded(self, model: str) -> None:
        self._crashes.pop(model, None)
        self._held.pop(model, None)

    @property
    def reasons(self) -> Mapping[str, str]:
        """Model → why it is held."""
        now = time.monotonic()
        self._held = {model: held for model, held in self._held.items() if held[1] > now}
        return {model: reason for model, (reason, _) in self._held.items()}

    def retry_after(self, model: str) -> int:
        """Whole seconds until it may be tried again; at least one."""
        _, until = self._held.get(model, ("", 0.0))
        return max(1, round(until - time.monotonic()))
