"""The engine of several machines: jobs go to worker replicas of a Ray Serve deployment, through Serve's own queue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextvars import Context
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayActorError, RayError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from app.engine.base import Catalogue, DeviceStatus, EngineStatus, Job, JobHandle, JobResult, StepListener
from app.engine.failures import RETRY_SECONDS, worker_lost
from app.engine.queue import JobQueue
from app.engine.replica import NAMESPACE, Word, roster_name
from app.engine.roster import BEAT, SILENCE, Presence, Roster
from app.engine.states import JobState, WorkerState
from app.errors import Cancelled, DeadlineExceeded, NotReady, QueueFull, ServiceError, WorkerLost
from models.base import Step

_log = logging.getLogger(__name__)

ATTEMPTS = 2  # as on one machine: the loss of a replica may not have been the job's doing
_LEAVING = "The server is shutting down. Ask again when it is back."
_LOST = (RayActorError, NodeDiedError, WorkerCrashedError, ReplicaUnavailableError)


class RayEngine:
    """See `Engine`. `workers` is the deployment of `Replica`; `app` the name of the Serve application that it is in.

    Every accepted job is a call to the deployment at once, so that Serve's autoscaler sees how many wait. Which of them
    wait is known here, and so is how many may. `stop` first drains for `drain_seconds`: Serve ends an application
    without a word beforehand.
    """

    def __init__(
        self, workers: DeploymentHandle[Any], app: str, *, queue_size: int = 64, drain_seconds: float = 0.0
    ) -> None:
        self._workers = workers
        self._app = app
        self._queue_size = queue_size
        self._drain_seconds = drain_seconds
        self._queue = JobQueue()
        self._carried: dict[JobHandle, asyncio.Task[None]] = {}
        self._present: dict[int, tuple[Presence, float]] = {}  # by rank, with the time of its last word
        self._lost: dict[str, str] = {}  # replica → why
        self._restarts: Counter[int] = Counter()
        self._catalogue: Catalogue | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._draining = False
        self._node = ""

    async def start(self) -> None:
        self._draining = False
        self._node = ray.get_runtime_context().get_node_id()
        self._watcher = asyncio.create_task(self._watch())

    async def drain(self, seconds: float) -> None:
        self._draining = True
        if pending := [asyncio.ensure_future(handle.result) for handle in self._carried]:
            await asyncio.wait(pending, timeout=seconds)
        self._answer_all()

    async def stop(self) -> None:
        await self.drain(self._drain_seconds)
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    def catalogue(self) -> Catalogue:
        if self._catalogue is None:
            raise NotReady("The models are not known yet. Try again soon.", retry_after=RETRY_SECONDS)
        return self._catalogue

    def submit(self, job: Job, on_step: StepListener | None = None, *, promised: bool = False) -> JobHandle:
        if self._draining:
            raise NotReady(_LEAVING, retry_after=RETRY_SECONDS)
        if len(self._carried) >= self._queue_size + self._places() and not promised:
            raise QueueFull(
                f"{self._queue_size} requests are waiting already. Try again later.", retry_after=RETRY_SECONDS
            )
        handle = JobHandle(job, on_step)
        if job.deadline_seconds is not None:
            timer = asyncio.get_running_loop().call_later(job.deadline_seconds, self._expire, handle)
            handle.result.add_done_callback(lambda _: timer.cancel())
        self._queue.put(handle)
        # In a context of its own: Serve would take the job for a part of the HTTP request that it is answering, and
        # cancel it when that request's client leaves. A job of POST /api/jobs outlives it.
        task = asyncio.get_running_loop().create_task(self._carry(handle), context=Context())
        self._carried[handle] = task
        task.add_done_callback(lambda _: self._carried_out(handle))
        return handle

    def cancel(self, job_id: str) -> bool:
        for handle in self._carried:
            if handle.job.id == job_id and not handle.settled:
                self._give_up(handle, Cancelled("The job was cancelled."), JobState.CANCELLED)
                return True
        return False

    def status(self) -> EngineStatus:
        rows = sorted(self._present.items())
        return EngineStatus(
            pending=len(self._queue),
            running=sum(handle.state is JobState.RUNNING for handle in self._carried),
            devices=tuple(self._device(rank) for rank, _ in rows),
            draining=self._draining,
            quarantined={name: why for _, (one, _) in rows for name, why in one.status.quarantined.items()},
        )

    def _places(self) -> int:
        """Jobs that run at a time when every replica that is there has its fill."""
        return sum(presence.jobs for rank, (presence, _) in self._present.items() if self._device(rank).ready)

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

    async def _watch(self) -> None:
        """Read the roster, again and again; one that is gone is made anew, and the replicas find it."""
        roster: Any = None
        while True:
            try:
                if roster is None:
                    roster = await asyncio.to_thread(_roster, self._app)
                self._heard_of(await asyncio.wait_for(roster.read.remote(), SILENCE))
            except Exception as error:  # noqa: BLE001  # whatever it was, without this nothing is ever known again
                _log.warning("the roster of replicas cannot be read: %r", error)
                roster = None
            await asyncio.sleep(BEAT)

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
                self._catalogue = presence.catalogue

    async def _carry(self, handle: JobHandle) -> None:
        """From the queue to the end of the job, whatever becomes of the replicas that have it."""
        for attempt in range(1, ATTEMPTS + 1):
            taken_by: list[str] = []
            try:
                await self._call(handle, taken_by)
                return
            except _LOST as error:
                self._mourn(handle, taken_by, error)
                if handle.settled:
                    return
                if attempt == ATTEMPTS:
                    self._give_up(handle, worker_lost("its replica ended"))
                elif handle.state is JobState.RUNNING:
                    self._requeue(handle)
            except DeploymentUnavailableError:
                self._give_up(handle, NotReady("No worker replica can be started.", retry_after=RETRY_SECONDS))
            except (RayError, RayServeException) as error:
                _log.exception("job not run", extra={"request_id": handle.job.id})
                self._give_up(handle, WorkerLost(f"The cluster did not run it: {type(error).__name__}."))
            except Exception:  # noqa: BLE001  # a bug of ours must not leave a request without an answer
                _log.exception("job not run", extra={"request_id": handle.job.id})
                self._give_up(handle, ServiceError("The server made a mistake; its log has it."))
            if handle.settled:
                return

    def _carried_out(self, handle: JobHandle) -> None:
        """Serve may end a call in ways of its own; no request is left without an answer."""
        if not handle.settled:
            self._give_up(handle, worker_lost("its replica gave it up"))
        del self._carried[handle]

    async def _call(self, handle: JobHandle, taken_by: list[str]) -> None:
        job = handle.job
        words = self._workers.options(method_name="run", stream=True, multiplexed_model_id=job.model).remote(job)
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
                self._queue.remove(handle)
                handle.succeed(word)
            case ServiceError():
                self._give_up(handle, word)

    def _requeue(self, handle: JobHandle) -> None:
        handle.requeue()
        self._queue.put(handle)

    def _mourn(self, handle: JobHandle, taken_by: list[str], error: BaseException) -> None:
        for replica in taken_by:
            self._lost[replica] = "its replica ended"
        _log.error("replica lost %s: %s", *(taken_by or "?"), type(error).__name__, extra={"request_id": handle.job.id})

    def _give_up(self, handle: JobHandle, error: ServiceError, state: JobState = JobState.FAILED) -> None:
        if handle.settled:
            return
        self._queue.remove(handle)
        handle.fail(error, state)
        if (task := self._carried[handle]) is not asyncio.current_task():
            task.cancel()

    def _expire(self, handle: JobHandle) -> None:
        if not handle.settled:
            where = "waited" if handle.state is JobState.QUEUED else "ran"
            limit = f"{handle.job.deadline_seconds:g} seconds"
            self._give_up(handle, DeadlineExceeded(f"The request still {where} after {limit}, its deadline."))

    def _answer_all(self) -> None:
        for handle in list(self._carried):
            self._give_up(handle, NotReady(_LEAVING, retry_after=RETRY_SECONDS))


def _roster(app: str) -> Any:
    """Of this application; made if there is none, and ended with whoever made it."""
    actor = ray.remote(Roster)
    return actor.options(name=roster_name(app), namespace=NAMESPACE, get_if_exists=True, num_cpus=0).remote()
