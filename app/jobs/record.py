"""What is known of one job, while it is on its way and for some time after."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from app.engine.types import JobHandle, JobState

EventName = Literal["queued", "running", "progress", "preview", "done", "error"]

LONGEST = 2048  # events kept of one job: more than the longest request has steps


@dataclass(frozen=True, slots=True)
class Event:
    """`number` counts from 1; it is the server-sent event's id."""

    number: int
    name: EventName
    data: Mapping[str, object]


class EventLog:
    """The events of one job. Belongs to one event loop; ends with a `done` or an `error`."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=LONGEST)
        self._last = 0
        self._news = asyncio.Event()
        self.ended = False

    def publish(self, name: EventName, data: Mapping[str, object]) -> None:
        """What comes after the end is dropped: a job ends once. Of previews only the newest is kept: they are large."""
        if self.ended:
            return
        if name == "preview":
            for event in self._events:
                if event.name == "preview":
                    self._events.remove(event)
                    break
        self._last += 1
        self._events.append(Event(self._last, name, data))
        self.ended = name in ("done", "error")
        self._news.set()
        self._news = asyncio.Event()

    def trim(self) -> None:
        """Keep the end alone."""
        while len(self._events) > 1:
            self._events.popleft()

    async def follow(self, after: int = 0) -> AsyncIterator[Event]:
        """Every kept event whose number is greater than `after`, then each new one until the end."""
        after = min(after, self._last)  # a client of an earlier run of the server may have counted further
        while True:
            news = self._news
            for event in [event for event in self._events if event.number > after]:
                after = event.number
                yield event
            if self.ended and after >= self._last:
                return
            await news.wait()


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
