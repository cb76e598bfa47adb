"""The engine of several machines: jobs go to the worker replicas of a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from app.engine import types
from app.engine.pipe import in_own_thread
from app.engine.supervisor import QueueingEngine, in_all
from app.engine.types import Catalogue, DeviceStatus, EngineStatus, JobHandle, JobResult, JobState, WorkerState
from app.errors import RETRY_SECONDS, NotReady, ServiceError, WorkerLost, leaving, queue_full, worker_lost
from app.ray.replica import BEAT, NAMESPACE, SILENCE, Presence, Roster, Word, roster_name
from models.base import Step

_log = logging.getLogger(__name__)

_LOST = (RayActorError, NodeDiedError, WorkerCrashedError, ReplicaUnavailableError)


class RayEngine(QueueingEngine):
    """See `Engine`. `workers` is the deployment of `Replica`; `app` the name of the Serve application that it is in.

    Jobs wait here, the oldest first, and one is handed to Serve when a replica has a place for it. `at_once`: all are
    handed over at once, so that Serve's autoscaler sees how many wait; those that wait there ask every few milliseconds
    whether a replica is free. `stop` first drains for `drain_seconds`: Serve ends an application without a word
    beforehand.
    """

    def __init__(
        self,
        workers: DeploymentHandle[Any],
        app: str,
        *,
        queue_size: int = 64,
        at_once: bool = False,
        drain_seconds: float = 0.0,
    ) -> None:
        super().__init__(queue_size)
        self._workers = workers
        self._at_once = at_once
        self._drain_seconds = drain_seconds
        self._fleet = Fleet(app, on_news=self._heard_of_fleet)
        self._calls: dict[JobHandle, asyncio.Task[None]] = {}  # of jobs handed to Serve
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._draining = False
        self._watcher = asyncio.create_task(self._fleet.watch())

    async def stop(self) -> None:
        await self.drain(self._drain_seconds)
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    def admit(self, model: str | None, *, promised: bool = False) -> None:
        if self._draining:
            raise leaving()
        if len(self._unsettled()) >= self._queue_size + self._fleet.places and not promised:
            raise queue_full(self._queue_size)

    def _accepted(self, handle: JobHandle) -> None:
        self._dispatch()

    def status(self) -> EngineStatus:
        return EngineStatus(
            pending=len(self._queue),
            running=sum(handle.state is JobState.RUNNING for handle in self._calls),
            devices=self._fleet.devices,
            draining=self._draining,
            quarantined=self._fleet.quarantined,
            unavailable=self._fleet.unavailable,
            capacity=self._queue_size,
        )

    def _unsettled(self) -> list[JobHandle]:
        running = [handle for handle in self._calls if handle.state is JobState.RUNNING]
        return [*running, *self._queue]

    def _heard_of_fleet(self) -> None:
        self._catalogue = self._fleet.catalogue
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand waiting jobs to Serve, oldest first, as many as there are places."""
        loop = asyncio.get_running_loop()
        for handle in self._queue:
            if len(self._calls) >= self._fleet.places and not self._at_once:
                return
            if handle not in self._calls:
                # In a context of its own: Serve would take the job for a part of the HTTP request that it is answering,
                # and cancel it when that one's client leaves. A job of POST /api/jobs outlives its request.
                self._calls[handle] = task = loop.create_task(self._carry(handle), context=Context())
                task.add_done_callback(partial(self._called, handle))

    def _called(self, handle: JobHandle, _: asyncio.Task[None]) -> None:
        """Serve may end a call in ways of its own; no request is left without an answer."""
        if not handle.settled:
            self._give_up(handle, worker_lost("its replica gave it up"))
        del self._calls[handle]
        self._dispatch()

    async def _carry(self, handle: JobHandle) -> None:
        """To the end of the job, whatever becomes of the replicas that have it."""
        for attempt in range(1, types.ATTEMPTS + 1):
            taken_by: list[str] = []
            try:
                await self._call(handle, taken_by)
                return
            except _LOST as error:
                self._fleet.lost.update(taken_by)
                named = ", ".join(taken_by) or "before it took the job"
                _log.error("replica lost: %s, %r", named, error, extra={"request_id": handle.job.id})
                if attempt == types.ATTEMPTS:
                    self._give_up(handle, worker_lost("its replica ended"))
                elif handle.state is JobState.RUNNING:
                    self._requeue(handle)
            except DeploymentUnavailableError:
                self._give_up(handle, NotReady("No worker replica can be started.", retry_after=RETRY_SECONDS))
            except (RayError, RayServeException) as error:
                _log.exception("job not run", extra={"request_id": handle.job.id})
                reason = f"The cluster did not run it: {type(error).__name__}."
                self._give_up(handle, WorkerLost(reason, retry_after=RETRY_SECONDS))
            except Exception:  # noqa: BLE001  # a bug of ours must not leave a request without an answer
                _log.exception("job not run", extra={"request_id": handle.job.id})
                self._give_up(handle, ServiceError("The server made a mistake; its log has it."))
            if handle.settled:
                return

    async def _call(self, handle: JobHandle, taken_by: list[str]) -> None:
        job = handle.job
        model = job.model or ""  # Serve's word for a call that needs none
        words = self._workers.options(method_name="run", stream=True, multiplexed_model_id=model).remote(job)
        try:
            async for word in words:
                if isinstance(word, str) and not isinstance(word, JobState):
                    taken_by.append(word)
                elif not handle.settled:
                    self._hear(handle, word)
        finally:
            words.cancel()  # nothing, if it is at its end

    def _hear(self, handle: JobHandle, word: Word) -> None:
        match word:
            case JobState.RUNNING:
                self._queue.remove(handle)
                handle.run()
            case JobState.QUEUED:
                self._requeue(handle)
            case Step():
                if handle.on_step is not None:
                    handle.on_step(word)
            case JobResult():
                handle.succeed(word)
            case ServiceError():
                self._give_up(handle, word)

    def _give_up(self, handle: JobHandle, error: ServiceError, state: JobState = JobState.FAILED) -> None:
        if handle.settled:
            return
        self._queue.remove(handle)
        handle.fail(error, state)
        task = self._calls.get(handle)
        if task is not None and task is not asyncio.current_task():
            task.cancel()


class Fleet:
    """The replicas of the Serve application `app`, by their own words. `on_news` is called after each reading."""

    def __init__(self, app: str, on_news: Callable[[], None]) -> None:
        self._app = app
        self._on_news = on_news
        self._node = ray.get_runtime_context().get_node_id()
        self._present: dict[int, tuple[Presence, float]] = {}  # by rank, with the time of its last word
        self._restarts: Counter[int] = Counter()
        self.catalogue: Catalogue | None = None
        self.lost: set[str] = set()  # replicas that are known to have ended, by a call to them, before they are missed

    async def watch(self) -> None:
        """Read the roster, again and again; one that is gone is made anew, and the replicas find it."""
        roster: Any = None
        while True:
            try:
                if roster is None:
                    roster = await in_own_thread("roster", _roster, self._app)
                self._heard_of(await asyncio.wait_for(roster.read.remote(), SILENCE))
                self._on_news()
            except Exception as error:  # noqa: BLE001  # whatever it was, without this nothing is ever known again
                _log.warning("the roster of replicas cannot be read: %r", error)
                roster = None
            await asyncio.sleep(BEAT)

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

    @property
    def unavailable(self) -> Mapping[str, str]:
        return in_all([one.status.unavailable for rank, (one, _) in self._present.items() if self._device(rank).up])

    def _device(self, rank: int) -> DeviceStatus:
        presence, heard = self._present[rank]
        (status,) = presence.status.devices
        status = replace(
            status,
            device=f"replica {rank}",
            restarts=status.restarts + self._restarts[rank],
            pid=status.pid if presence.node == self._node else None,  # another machine's is some other process here
        )
        if presence.replica not in self.lost and time.monotonic() - heard < SILENCE:
            return status
        reason = "its replica ended" if presence.replica in self.lost else "it gave no sign of life"
        lost = replace(status, state=WorkerState.FAILED, up=False, pid=None, reason=reason)
        return replace(lost, loaded=(), plans={}, loading=None)

    def _heard_of(self, rows: list[tuple[Presence, float]]) -> None:
        """`rows`: as Roster.read gives them, so of two with one rank the one heard last stays."""
        now = time.monotonic()
        before = {rank: presence for rank, (presence, _) in self._present.items()}
        self._present = {presence.rank: (presence, now - age) for presence, age in rows}
        self.lost &= {one.replica for one, _ in rows}
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
