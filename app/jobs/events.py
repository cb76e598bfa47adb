"""What happened to a job, in order, for whoever follows it now or comes back to it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Literal

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
