"""What is known of one job, while it is on its way and for some time after."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.engine.base import JobHandle
from app.engine.states import JobState
from app.jobs.events import EventLog


@dataclass(slots=True, kw_only=True)
class JobRecord:
    """Times are Unix seconds. `handle` is the engine's, of a job that this process runs.

    `request` is the client's body, kept on disk only where a restart is to take the job up again; `key` and
    `fingerprint` are hashes of the idempotency key and of the body. `error` is what a synchronous client would have
    been answered.
    """

    id: str
    model: str | None = None
    state: JobState = JobState.QUEUED
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    step: int = 0
    total: int | None = None
    attempts: int = 0
    error: Mapping[str, Any] | None = None
    request: Mapping[str, Any] | None = None
    key: str | None = None
    fingerprint: str | None = None
    handle: JobHandle | None = field(default=None, repr=False)
    events: EventLog = field(default_factory=EventLog, repr=False)

    @property
    def ended(self) -> bool:
        return self.finished is not None

    def end(self, state: JobState, error: Mapping[str, Any] | None = None) -> None:
        if self.ended:
            raise RuntimeError(f"job {self.id} was to end a second time")
        self.state, self.error, self.finished = state, error, time.time()

    def shown(self) -> dict[str, object]:
        """The job as its client sees it, without the result."""
        return {
            "id": self.id,
            "state": self.state.value,
            "model": self.model,
            "position": self.handle.place if self.handle is not None and not self.ended else None,
            "step": self.step,
            "total": self.total,
            "attempts": self.attempts,
            "created": round(self.created, 3),
            "started": round(self.started, 3) if self.started else None,
            "finished": round(self.finished, 3) if self.finished else None,
            "error": self.error,
        }
