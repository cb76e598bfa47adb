"""The engine of one machine: a bounded queue and one supervised worker process a device."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence

from app.engine.base import (
    Catalogue,
    DeviceMemory,
    DeviceStatus,
    EngineStatus,
    Job,
    JobHandle,
    JobState,
    StepListener,
    WorkerState,
)
from app.engine.messages import Cancel, Condition, Done, Failed, Progress, Ready, Report, Run, StartFailed
from app.engine.process import WorkerProcess
from app.engine.worker import RunnerFactory
from app.errors import (
    Cancelled,
    GenerationFailed,
    Incompatible,
    Invalid,
    ModelNotFound,
    ModelUnavailable,
    NotReady,
    OutOfMemory,
    QueueFull,
    ServiceError,
    WorkerLost,
)

_log = logging.getLogger(__name__)

ATTEMPTS = 2  # a job whose worker dies is tried once more: the death may not have been its doing
START_FAILURES = 3  # so many in a row and those who wait are told, instead of waiting for ever
RETRY_SECONDS = 5  # what a client is told to wait


class _Slot:
    """A device and whatever worker it has at the moment."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.state = WorkerState.STARTING
        self.process: WorkerProcess | None = None
        self.running: JobHandle | None = None
        self.condition: Condition | None = None
        self.restarts = 0
        self.deaths = 0  # since the last job that was finished; the exponent of the backoff
        self.start_failures = 0

    def status(self) -> DeviceStatus:
        alive = self.state in (WorkerState.READY, WorkerState.BUSY)
        condition = self.condition
        return DeviceStatus(
            device=self.device,
            kind=condition.kind if condition else self.device.split(":")[0],
            name=condition.name if condition else self.device,
            state=self.state,
            pid=self.process.pid if self.process else None,
            restarts=self.restarts,
            memory=condition.memory if condition and alive else DeviceMemory(),
            loaded=condition.loaded if condition and alive else (),
        )


class LocalEngine:
    """See `Engine`. `backoff` is the first and the longest pause before a dead worker is replaced, in seconds."""

    def __init__(
        self,
        factory: RunnerFactory,
        devices: Sequence[str] = ("auto",),
        *,
        queue_size: int = 64,
        stop_seconds: float = 10.0,
        backoff: tuple[float, float] = (0.1, 30.0),
    ) -> None:
        self._factory = factory
        self._slots = [_Slot(device) for device in devices]
        self._queue: deque[JobHandle] = deque()
        self._queue_size = queue_size
        self._stop_seconds = stop_seconds
        self._backoff = backoff
        self._catalogue: Catalogue | None = None
        self._supervisors: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        self._stopping = False
        self._supervisors = [asyncio.create_task(self._supervise(slot)) for slot in self._slots]

    async def stop(self) -> None:
        self._stopping = True
        self._refuse_waiting("The server is shutting down.")
        for slot in self._slots:
            if slot.running is not None:
                self.cancel(slot.running.job.id)
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)

    def catalogue(self) -> Catalogue:
        if self._catalogue is None:
            raise NotReady("The model is still being loaded. Try again soon.", retry_after=RETRY_SECONDS)
        return self._catalogue

    def submit(self, job: Job, on_step: StepListener | None = None) -> JobHandle:
        if self._stopping:
            raise NotReady("The server is shutting down.", retry_after=RETRY_SECONDS)
        if self._hopeless():
            raise NotReady("No worker can be started; the server's log says why.", retry_after=RETRY_SECONDS)
        if len(self._queue) >= self._queue_size:
            raise QueueFull(
                f"{self._queue_size} requests are waiting already. Try again later.", retry_after=RETRY_SECONDS
            )
        handle = JobHandle(job, on_step)
        self._queue.append(handle)
        self._dispatch()
        return handle

    def cancel(self, job_id: str) -> bool:
        for handle in self._queue:
            if handle.job.id == job_id:
                self._queue.remove(handle)
                handle.fail(Cancelled("The job was cancelled while it waited."), JobState.CANCELLED)
                return True
        for slot in self._slots:
            if slot.running is not None and slot.running.job.id == job_id and slot.process is not None:
                slot.running.cancel_requested = True
                slot.process.send(Cancel(job_id))
                return True
        return False

    def status(self) -> EngineStatus:
        return EngineStatus(
            pending=len(self._queue),
            running=sum(slot.running is not None for slot in self._slots),
            devices=tuple(slot.status() for slot in self._slots),
        )

    def _dispatch(self) -> None:
        """Give waiting jobs to idle workers, oldest first."""
        for slot in self._slots:
            if self._queue and slot.state is WorkerState.READY and slot.process is not None:
                handle = self._queue.popleft()
                handle.run()
                slot.running = handle
                slot.state = WorkerState.BUSY
                slot.process.send(Run(handle.job))

    async def _supervise(self, slot: _Slot) -> None:
        """Keep a worker on this device until cancelled."""
        while True:
            slot.state = WorkerState.STARTING
            process = slot.process = WorkerProcess(self._factory, slot.device)
            try:
                await process.start()
                async for report in process.reports():
                    self._hear(slot, report)
            except OSError as error:
                _log.error("worker device=%s cannot be started: %s", slot.device, error)
            finally:
                # Killed at once when it is known to be dead or when we stop with a job on it that ignores its cancel.
                code = await asyncio.shield(process.stop(self._stop_seconds if self._stopping else 0.0))
                self._bury(slot, code)
            slot.restarts += 1
            first, longest = self._backoff
            await asyncio.sleep(min(first * 2 ** min(slot.deaths, 16), longest))

    def _hear(self, slot: _Slot, report: Report) -> None:
        match report:
            case Ready(catalogue, condition):
                self._catalogue = catalogue
                slot.condition = condition
                slot.state = WorkerState.READY
                slot.start_failures = 0
                _log.info("worker ready device=%s pid=%s", slot.device, slot.process and slot.process.pid)
            case StartFailed(message, detail):
                _log.error("worker device=%s failed to start: %s\n%s", slot.device, message, detail)
            case Progress(_, step):
                if slot.running is not None and slot.running.on_step is not None:
                    slot.running.on_step(step)
            case Done(_, result, condition):
                self._release(slot, condition).succeed(result)
            case Failed(job_id, kind, message, detail, condition):
                state = JobState.CANCELLED if kind == "cancelled" else JobState.FAILED
                if kind != "cancelled":
                    _log.warning("job failed kind=%s: %s", kind, detail, extra={"request_id": job_id})
                self._release(slot, condition).fail(_error(report), state)
        self._dispatch()

    def _release(self, slot: _Slot, condition: Condition) -> JobHandle:
        """The worker is idle again; return the job that it had."""
        handle, slot.running = slot.running, None
        if handle is None:
            raise RuntimeError("a worker reported the end of a job that it was not given")
        slot.condition = condition
        slot.state = WorkerState.READY
        slot.deaths = 0
        return handle

    def _bury(self, slot: _Slot, code: int | None) -> None:
        """The worker is dead: see to the job that it had, and to those who would wait for nothing."""
        if slot.state is WorkerState.STARTING:
            slot.start_failures += 1
        slot.state = WorkerState.DEAD
        slot.deaths += 1
        slot.process = None
        handle, slot.running = slot.running, None
        if not self._stopping:
            lost = {"request_id": handle.job.id} if handle else None
            _log.error("worker lost device=%s exit_code=%s", slot.device, code, extra=lost)
        if handle is not None:
            if self._stopping:
                handle.fail(NotReady("The server is shutting down.", retry_after=RETRY_SECONDS))
            elif handle.cancel_requested:
                handle.fail(Cancelled("The job was cancelled."), JobState.CANCELLED)
            elif handle.attempts < ATTEMPTS:
                handle.requeue()
                self._queue.appendleft(handle)  # it had its turn: ahead of the others, and the bound doesn't apply
            else:
                handle.fail(
                    WorkerLost(
                        "The worker process died twice while it ran this request. If it repeats, ask for less: "
                        "a smaller picture, fewer images at once.",
                        retry_after=RETRY_SECONDS,
                    )
                )
        if self._hopeless():
            self._refuse_waiting("No worker can be started; the server's log says why.")

    def _hopeless(self) -> bool:
        return all(slot.start_failures >= START_FAILURES for slot in self._slots)

    def _refuse_waiting(self, message: str) -> None:
        while self._queue:
            self._queue.popleft().fail(NotReady(message, retry_after=RETRY_SECONDS))


def _error(failure: Failed) -> ServiceError:
    """What the client is told. Only messages written for users are passed on; stack traces stay in the log."""
    match failure.kind:
        case "cancelled":
            return Cancelled("The job was cancelled.")
        case "unknown_model":
            return ModelNotFound(failure.message, field="model")
        case "load_failed":
            return ModelUnavailable(  # its own message names folders of this machine
                "The model is configured, but its files do not load; the server's log says why. Ask for another one.",
                field="model",
                retry_after=RETRY_SECONDS,
            )
        case "model_error":
            return Invalid(failure.message)
        case "incompatible":
            return Incompatible(failure.message)
        case "out_of_memory":
            return OutOfMemory(
                "The device ran out of memory. Lower batch_size, width or height, or deepcache_depth, "
                "or turn off other features that hold memory.",
                retry_after=RETRY_SECONDS,
            )
        case _:
            return GenerationFailed("The model failed on this request; the server's log has the cause.")
