"""Which worker replicas there are and how they are: they tell of themselves, whoever hands out jobs reads it.

An actor of its own, since Serve offers no way to ask a replica that is busy: its one place is taken by its job.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from app.engine.base import Catalogue, EngineStatus

BEAT = 0.5  # seconds between two words of a replica
SILENCE = 5.0  # seconds without one after which a replica is not counted on: Serve finds out by itself, but later
FORGET = 60.0  # seconds after which one that was lost is not told of any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A replica's word on itself. `rank` is its place among the replicas, from 0, which its successor inherits."""

    replica: str
    rank: int
    node: str
    jobs: int  # that it takes at a time
    status: EngineStatus
    catalogue: Catalogue | None = None


class Roster:
    """Ages are seconds of one clock, this process's own: those of several machines differ."""

    def __init__(self) -> None:
        self._present: dict[str, tuple[Presence, float]] = {}

    def tell(self, presence: Presence) -> None:
        self._present[presence.replica] = presence, time.monotonic()

    def leave(self, replica: str) -> None:
        """It ends as it should, and is not missed."""
        self._present.pop(replica, None)

    def read(self) -> list[tuple[Presence, float]]:
        """Each with the seconds since its last word, the longest silent one first."""
        now = time.monotonic()
        self._present = {key: row for key, row in self._present.items() if now - row[1] < FORGET}
        return sorted(((one, now - heard) for one, heard in self._present.values()), key=lambda row: -row[1])
