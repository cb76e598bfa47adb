"""What is known of the worker replicas: read from the roster, and heard where a call to one of them ends with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray

from app.engine.base import Catalogue, DeviceStatus
from app.engine.replica import NAMESPACE, roster_name
from app.engine.roster import BEAT, SILENCE, Presence, Roster
from app.engine.states import WorkerState

_log = logging.getLogger(__name__)


class Fleet:
    """Of the Serve application `app`. `on_news` is called after each reading."""

    def __init__(self, app: str, on_news: Callable[[], None]) -> None:
        self._app = app
        self._on_news = on_news
        self._node = ray.get_runtime_context().get_node_id()
        self._present: dict[int, tuple[Presence, float]] = {}  # by rank, with the time of its last word
        self._lost: dict[str, str] = {}  # replica → why
        self._restarts: Counter[int] = Counter()
        self.catalogue: Catalogue | None = None

    async def watch(self) -> None:
        """Read the roster, again and again; one that is gone is made anew, and the replicas find it."""
        roster: Any = None
        while True:
            try:
                if roster is None:
                    roster = await asyncio.to_thread(_roster, self._app)
                self._heard_of(await asyncio.wait_for(roster.read.remote(), SILENCE))
                self._on_news()
            except Exception as error:  # noqa: BLE001  # whatever it was, without this nothing is ever known again
                _log.warning("the roster of replicas cannot be read: %r", error)
                roster = None
            await asyncio.sleep(BEAT)

    def lose(self, replica: str, reason: str) -> None:
        """Known before it is missed: a call to it said so."""
        self._lost[replica] = reason

    @property
    def places(self) -> int:
        """Jobs that run at a time when every replica that is there has its fill."""
        return sum(presence.jobs for rank, (presence, _) in self._present.items() if self._device(rank).ready)

    @property
    def devices(self) -> tuple[DeviceStatus, ...]:
        """One a replica, in the order of their ranks."""
        return tuple(self._device(rank) for rank in sorted(self._present))

    @property
    def quarantined(self) -> Mapping[str, str]:
        return {name: why for one, _ in self._present.values() for name, why in one.status.quarantined.items()}

    def _device(self, rank: int) -> DeviceStatus:
        presence, heard = self._present[rank]
        (status,) = presence.status.devices
        status = replace(
            status,
            device=f"replica {rank}",
            restarts=status.restarts + self._restarts[rank],
            pid=status.pid if presence.node == self._node else None,  # another machine's is some other process here
        )
        if presence.replica not in self._lost and time.monotonic() - heard < SILENCE:
            return status
        reason = self._lost.get(presence.replica, "it gave no sign of life")
        return replace(status, state=WorkerState.FAILED, up=False, pid=None, loaded=(), loading=None, reason=reason)

    def _heard_of(self, rows: list[tuple[Presence, float]]) -> None:
        """`rows`: as Roster.read gives them, so of two with one rank the one heard last stays."""
        now = time.monotonic()
        before = {rank: presence for rank, (presence, _) in self._present.items()}
        self._present = {presence.rank: (presence, now - age) for presence, age in rows}
        self._lost = {one.replica: self._lost[one.replica] for one, _ in rows if one.replica in self._lost}
        for rank, (presence, _) in self._present.items():
            former = before.get(rank, presence)
            if former.replica != presence.replica:
                self._restarts[rank] += 1 + former.status.devices[0].restarts
                _log.info("replica %d is another one now: %s", rank, presence.replica)
            if presence.catalogue is not None:
                self.catalogue = presence.catalogue


def _roster(app: str) -> Any:
    """Of this application; made if there is none, and ended with whoever made it."""
    actor = ray.remote(Roster)
    return actor.options(name=roster_name(app), namespace=NAMESPACE, get_if_exists=True, num_cpus=0).remote()
