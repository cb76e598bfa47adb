"""A worker replica of Ray Serve: the engine of one machine with one device, behind a stream of words on one job."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from app.engine.pipe import in_own_thread
from app.engine.supervisor import local_engine
from app.engine.types import AnyJob, Catalogue, EngineStatus, JobResult, JobState
from app.engine.worker import RunnerFactory
from app.errors import NotReady, ServiceError
from app.log import logging_to
from app.settings import Settings
from models.base import Step

_log = logging.getLogger(__name__)

NAMESPACE = "wavespeed"
BEAT = 0.5  # seconds between two words of a replica
SILENCE = 5.0  # seconds without one after which a replica is not counted on: Serve finds out by itself, but later
FORGET = 60.0  # seconds after which one that was lost is not told of any more

Word = str | JobState | Step | JobResult | ServiceError
"""What a replica says of a job: its own id first, then moves and steps, a result or an error last."""


def roster_name(app: str) -> str:
    return f"roster of {app}"


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
    """Who there is. Ages are seconds of one clock, this process's own: those of several machines differ."""

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


class Replica:
    """Serve gives it a device and `jobs` requests at a time; the worker process below it is the local engine's.

    So a fault of the device, a hang and a model that crashes are dealt with as on one machine, and cost a process
    instead of a replica. `models`: names that Serve remembers a replica for, to send it their requests.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, factory: RunnerFactory, *, jobs: int, models: int
    ) -> None:
        context = serve.get_replica_context()
        self._id = context.replica_tag
        self._app = context.app_name
        self._stack = ExitStack()
        folder = settings.log_folder / f"replica-{context.rank.rank}"
        self._stack.enter_context(logging_to(folder, settings.log_level, settings.log_format))
        self._engine = local_engine(settings, factory)
        self._jobs = jobs

        async def held(model: str) -> str:
            return model  # the registry below loads it, and makes room for it, by bytes

        self._held = serve.multiplexed(max_num_models_per_replica=models)(held)
        await self._engine.start()
        self._beat = asyncio.create_task(self._tell())
        while not self._engine.status().ready:
            if self._engine.hopeless:
                raise RuntimeError("No worker can be started; the replica's log says why.")
            await asyncio.sleep(0.05)

    async def run(self, job: AnyJob) -> AsyncIterator[Word]:
        """Cancelled, at whatever word, the job is given up: its worker is free at the next step."""
        yield self._id
        words: asyncio.Queue[Word] = asyncio.Queue()
        try:
            if job.model is not None:
                await self._held(job.model)
            # The deadline runs where the request was accepted, and ends this call.
            job = replace(job, deadline_seconds=None)
            handle = self._engine.submit(job, words.put_nowait, promised=True)
        except ServiceError as error:
            yield error
            return
        told = JobState.QUEUED

        def moved() -> None:
            nonlocal told
            if handle.state is not told and not handle.settled:  # it may be its place alone that has changed
                told = handle.state
                words.put_nowait(told)

        handle.on_change = moved
        moved()
        handle.result.add_done_callback(lambda future: words.put_nowait(_end(future)))
        try:
            while not isinstance(word := await words.get(), JobResult | ServiceError):
                yield word
            yield word
        finally:
            handle.on_change = None
            self._engine.cancel(job.id)

    async def check_health(self) -> None:
        """Serve asks now and then. A worker process that is replaced at the moment is no reason to end the replica."""
        if self._engine.hopeless:
            raise RuntimeError("No worker can be started here.")
        if self._beat.done():
            raise RuntimeError("It tells nobody any more that it is there, so no job would be handed to it.")

    async def __del__(self) -> None:
        """Serve waits for the jobs before; those that are still here are answered."""
        if not hasattr(self, "_beat"):
            return
        self._beat.cancel()
        with suppress(ValueError, RayError):  # no roster, nobody to take leave of
            await ray.get_actor(roster_name(self._app), NAMESPACE).leave.remote(self._id)
        await self._engine.stop()
        self._stack.close()

    async def _tell(self) -> None:
        """To the roster, again and again; one that is gone is looked up anew."""
        roster: Any = None
        while True:
            try:
                if roster is None:
                    roster = await in_own_thread("roster", ray.get_actor, roster_name(self._app), NAMESPACE)
                await roster.tell.remote(self._presence())
            except (ValueError, RayError):
                roster = None
            await asyncio.sleep(BEAT)

    def _presence(self) -> Presence:
        try:
            catalogue = self._engine.catalogue()
        except NotReady:
            catalogue = None
        return Presence(
            replica=self._id,
            rank=serve.get_replica_context().rank.rank,
            node=ray.get_runtime_context().get_node_id(),
            jobs=self._jobs,
            status=self._engine.status(),
            catalogue=catalogue,
        )


def _end(future: asyncio.Future[JobResult]) -> Word:
    error = future.exception()
    if error is None:
        return future.result()
    return error if isinstance(error, ServiceError) else ServiceError(str(error))
