"""What every engine does with the jobs that it accepts, and the engine of one machine, a worker process a device."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

from app import errors
from app.engine import pipe, types
from app.engine.pipe import WorkerProcess
from app.engine.queue import Grouping, JobQueue, kind_of
from app.engine.slot import Patience, Quarantine, Slot, death
from app.engine.types import (
    AnyJob,
    Catalogue,
    Engine,
    EngineStatus,
    IllegalTransition,
    JobHandle,
    JobState,
    StepListener,
    WorkerState,
)
from app.engine.worker import RunnerFactory, Spawn, spawn
from app.errors import Cancelled, DeadlineExceeded, NotReady, ServiceError
from app.settings import Settings

_log = logging.getLogger(__name__)

START_FAILURES = 3  # so many in a row and those who wait are told, instead of waiting for ever


def in_all(reasons: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The models that each of the workers has a reason for, with that of the first."""
    return {model: why for model, why in reasons[0].items() if all(model in one for one in reasons)} if reasons else {}


class QueueingEngine(Engine):
    """What every `Engine` does with the jobs that it accepts, whoever draws them."""

    def __init__(self, queue_size: int) -> None:
        self._queue_size = queue_size
        self._queue = JobQueue()
        self._draining = False
        self._catalogue: Catalogue | None = None

    def catalogue(self) -> Catalogue:
        if self._catalogue is None:
            raise NotReady("The models are not known yet: the server is starting.", retry_after=errors.RETRY_SECONDS)
        return self._catalogue

    @abstractmethod
    def _unsettled(self) -> list[JobHandle]:
        """Those that are drawn, and those that wait."""

    @abstractmethod
    def _accepted(self, handle: JobHandle) -> None:
        """It is in the queue now."""

    @abstractmethod
    def _give_up(self, handle: JobHandle, error: ServiceError, state: JobState = JobState.FAILED) -> None:
        """Answer now, wherever the job is."""

    def submit(self, job: AnyJob, on_step: StepListener | None = None, *, promised: bool = False) -> JobHandle:
        for model in job.models or (None,):
            self.admit(model, promised=promised)
        handle = JobHandle(job, on_step, kind_of(job))
        handle.limit(self._expire)
        self._queue.put(handle)
        self._accepted(handle)
        return handle

    def cancel(self, job_id: str) -> bool:
        for handle in self._unsettled():
            if handle.job.id == job_id:
                self._give_up(handle, Cancelled("The job was cancelled."), JobState.CANCELLED)
                return True
        return False

    async def drain(self, seconds: float) -> None:
        self._draining = True
        if pending := [asyncio.ensure_future(handle.result) for handle in self._unsettled()]:
            await asyncio.wait(pending, timeout=seconds)
        self._answer_all()

    def _answer_all(self) -> None:
        for handle in self._unsettled():
            self._give_up(handle, errors.leaving())

    def _expire(self, handle: JobHandle) -> None:
        where = "waited" if handle.state is JobState.QUEUED else "ran"
        late = f"The request still {where} after {handle.job.deadline_seconds:g} seconds, its deadline."
        self._give_up(handle, DeadlineExceeded(f"{late} Ask for less, or allow more in deadline_seconds."))

    def _requeue(self, handle: JobHandle) -> None:
        handle.requeue()  # by itself from now on: the loss may have been the doing of one of several
        self._queue.put(handle)  # it is promised: the bound does not apply


class LocalEngine(QueueingEngine):
    """See `Engine`.

    backoff: the first and the longest pause before a lost worker is replaced, in seconds.
    max_batch_size: images of different jobs that are denoised together at most; 1 runs each job by itself.
    batch_timeout: seconds that a free worker waits at most for such jobs, see `Grouping`.
    """

    def __init__(
        self,
        factory: RunnerFactory,
        devices: Sequence[str] = ("auto",),
        *,
        queue_size: int = 64,
        stop_seconds: float = 10.0,
        backoff: tuple[float, float] = (0.1, 30.0),
        patience: Patience | None = None,
        quarantine_seconds: float = 600.0,
        max_batch_size: int = 1,
        batch_timeout: float = 0.0,
        make: Spawn = spawn,
    ) -> None:
        super().__init__(queue_size)
        self._factory = factory
        self._slots = [Slot(device) for device in devices]
        self._grouping = Grouping(max_batch_size, batch_timeout)
        self._later: asyncio.TimerHandle | None = None  # when to look at a group again that waits for company
        self._stop_seconds = stop_seconds
        self._backoff = backoff
        self._patience = patience or Patience()
        self._quarantine = Quarantine(quarantine_seconds)
        self._make = make
        self._supervisors: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self) -> None:
        self._draining = self._stopping = False
        self._supervisors = [asyncio.create_task(self._supervise(slot)) for slot in self._slots]

    async def drain(self, seconds: float) -> None:
        if self._draining and seconds == 0:
            self._stop_seconds = 0.0  # somebody is in a hurry
        self._draining = True
        for slot in self._slots:
            slot.settle(draining=True)
        self._dispatch()  # a group that waited for company
        await super().drain(seconds)

    async def stop(self) -> None:
        self._draining = self._stopping = True
        self._answer_all()
        for supervisor in self._supervisors:
            supervisor.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)

    def admit(self, model: str | None, *, promised: bool = False) -> None:
        if self._draining:
            raise errors.leaving()
        if self.hopeless:
            raise _hopeless()
        if model is not None and model in self._quarantine.reasons:
            raise self._quarantine.refusal(model)
        if len(self._queue) >= self._queue_size and not promised:
            raise errors.queue_full(self._queue_size)

    def _accepted(self, handle: JobHandle) -> None:
        self._grouping.arrived(handle, tuple(self._queue), self._running())
        self._dispatch()

    def status(self) -> EngineStatus:
        return EngineStatus(
            pending=len(self._queue),
            running=len(self._running()),
            devices=tuple(slot.status() for slot in self._slots),
            capacity=self._queue_size,
            draining=self._draining,
            quarantined=self._quarantine.reasons,
            unavailable=self._unavailable(),
        )

    def _unsettled(self) -> list[JobHandle]:
        return [*(handle for handle in self._running() if not handle.settled), *self._queue]

    def _give_up(self, handle: JobHandle, error: ServiceError, state: JobState = JobState.FAILED) -> None:
        """Answer now; the worker is told, and takes the next job when it has reached its next step."""
        if not self._queue.remove(handle):
            for slot in self._slots:
                if handle in slot.jobs:
                    slot.send(pipe.Cancel(handle.job.id))
        handle.fail(error, state)

    def _unavailable(self) -> dict[str, str]:
        return in_all([slot.unavailable for slot in self._slots if slot.up])

    def _dispatch(self) -> None:
        """Give waiting jobs to free workers, the oldest first and with it those that can be drawn together with it."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        free = [slot for slot in self._slots if slot.free]
        nowhere = self._unavailable()
        while free and self._queue:
            slot = free.pop(0)
            # What this worker could not load is left to one that may; what none could is tried again by whichever.
            waiting = [one for one in self._queue if one.job.model in nowhere or one.job.model not in slot.unavailable]
            if not waiting:
                continue
            drawing = [handle for slot in self._slots for handle in slot.running]
            finishing = [handle for slot in self._slots for handle in slot.finishing]
            group, seconds = self._grouping.choose(waiting, drawing, finishing, idle=len(free), hurry=self._draining)
            if not group:
                self._later = asyncio.get_running_loop().call_later(seconds, self._dispatch)
                return
            self._queue.take(group)
            for handle in group:
                handle.run()
            slot.running = group
            slot.advance()
            slot.settle(self._draining)
            heard = frozenset(handle.job.id for handle in group if handle.on_step is not None)
            slot.send(pipe.Run(tuple(handle.job for handle in group), heard))

    def _running(self) -> list[JobHandle]:
        return [handle for slot in self._slots for handle in slot.jobs]

    async def _supervise(self, slot: Slot) -> None:
        """Keep a worker on this device until cancelled."""
        while True:
            slot.move(WorkerState.STARTING)
            slot.advance()
            _log.info("worker starts device=%s: it reads what the models are, which takes seconds", slot.device)
            avoid = frozenset(self._quarantine.reasons)
            plan = pipe.Plan(heartbeat_seconds=self._patience.heartbeat, avoid=avoid)
            make = partial(self._make, factory=self._factory, device=slot.device, plan=plan)
            process = slot.process = WorkerProcess(slot.device, make)
            watch = asyncio.create_task(slot.watch(process, self._patience))
            try:
                await process.start()
                while self._hear(slot, await process.report()):  # which may hold pictures: no name keeps it here
                    pass
            except OSError as error:
                _log.error("worker device=%s cannot be started: %s", slot.device, error)
            except IllegalTransition as error:
                slot.fault = "it reported what cannot be"
                _log.error("worker device=%s: %s", slot.device, error)
            except Exception:  # noqa: BLE001  # a bug of ours, in a listener for one, must not leave the device without a worker
                slot.fault = "the server made a mistake"
                _log.exception("worker device=%s", slot.device)
            finally:
                watch.cancel()
                # Killed at once when it is known to be lost; at shutdown it may reach its next step.
                ending = asyncio.create_task(process.stop(self._stop_seconds if self._stopping else 0.0))
                while not ending.done():  # to its end, also when the engine is stopped meanwhile
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait({ending})
                self._bury(slot, ending.result())
            if self._stopping:
                return
            slot.restarts += 1
            first, longest = self._backoff
            await asyncio.sleep(min(first * 2 ** min(slot.deaths, 16), longest))

    def _hear(self, slot: Slot, report: pipe.Report | None) -> bool:
        """False: it was the last one. Raises IllegalTransition for one that cannot be."""
        match report:
            case None:
                return False
            case pipe.Alive():
                return True
            case pipe.Known(catalogue):
                self._catalogue = catalogue
            case pipe.Loading(model, stage):
                slot.loading, slot.stage = model, stage
                _log.info("loading model=%s device=%s: %s", model, slot.device, stage or "begins")
                slot.advance()
            case pipe.Loaded():
                self._loaded(slot)
            case pipe.Unavailable(model, detail):
                slot.unavailable[model] = types.NOT_LOADED
                slot.loading = None
                slot.advance()
                _log.error("model %s cannot be loaded device=%s: %s", model, slot.device, detail)
            case pipe.Ready(condition):
                self._loaded(slot)
                slot.learn(condition)
                slot.up = True
                slot.start_failures = 0
                _log.info("worker ready device=%s pid=%s", slot.device, slot.process and slot.process.pid)
            case pipe.StartFailed(message, detail):
                slot.loading = None  # it was told, not seen: no crash of the model
                slot.fault = "it could not load its models; the server's log says why"
                _log.error("worker device=%s failed to start: %s\n%s", slot.device, message, detail)
            case pipe.Progress(steps):
                slot.advance()
                for running in slot.running:
                    step = steps.get(running.job.id)
                    if step is not None and not running.settled and running.on_step is not None:
                        running.on_step(step)
            case pipe.Free(condition):
                slot.drawn()
                slot.advance()
                slot.loading = None
                slot.learn(condition)
            case pipe.Done(job_id, result):
                handle = self._release(slot, job_id)
                if not handle.settled:
                    handle.succeed(result)
            case pipe.Failed(job_id, error, detail):
                handle = self._release(slot, job_id)
                if not isinstance(error, Cancelled):
                    _log.warning("job failed type=%s: %s", error.type, detail, extra={"request_id": job_id})
                elsewhere = handle.job.model in slot.unavailable.keys() - self._unavailable().keys()
                if elsewhere and not handle.settled:
                    self._requeue(handle)
                elif not handle.settled:
                    handle.fail(error)
        slot.settle(self._draining)
        self._dispatch()
        return True

    def _loaded(self, slot: Slot) -> None:
        if slot.loading is not None:
            self._quarantine.loaded(slot.loading)
        slot.loading = None
        slot.advance()

    def _release(self, slot: Slot, job_id: str) -> JobHandle:
        """The worker has ended this job. Raises IllegalTransition when that is none that it has drawn."""
        handle = slot.finish(job_id)
        self._grouping.ended(handle)
        slot.advance()
        slot.deaths = 0
        return handle

    def _bury(self, slot: Slot, code: int | None) -> None:
        """The worker is gone: see to the job that it had, and to those who would wait for nothing."""
        slot.reason = slot.fault or death(code)
        loading, slot.loading = slot.loading, None
        lost, slot.running, slot.finishing = slot.jobs, [], []
        if not slot.up:
            slot.start_failures += 1
        slot.up, slot.fault, slot.process, slot.unavailable = False, None, None, {}
        slot.deaths += 1
        slot.move(WorkerState.FAILED)
        if self._stopping:
            return
        _log.error("worker lost device=%s exit_code=%s: %s", slot.device, code, slot.reason)
        for handle in lost:
            _log.error("its worker was lost: %s", slot.reason, extra={"request_id": handle.job.id})
        if loading is not None and self._quarantine.crashed(loading, slot.reason):
            _log.error("model %s is quarantined: %s", loading, self._quarantine.reasons[loading])
            for waiting in self._queue:
                if loading in waiting.job.models:
                    self._give_up(waiting, self._quarantine.refusal(loading))
        for handle in lost:
            if not handle.settled:
                self._take_back(handle, slot.reason)
        if self.hopeless:
            for waiting in self._queue:
                self._give_up(waiting, _hopeless())
        self._dispatch()

    def _take_back(self, handle: JobHandle, reason: str) -> None:
        """A job whose worker was lost: once more, or answered."""
        if kept_away := self._quarantine.reasons.keys() & set(handle.job.models):
            handle.fail(self._quarantine.refusal(kept_away.pop()))
        elif handle.attempts < types.ATTEMPTS:
            self._requeue(handle)
        else:
            handle.fail(errors.worker_lost(reason))

    @property
    def hopeless(self) -> bool:
        """No device's worker came up when it was started last, nor several times before."""
        return all(slot.start_failures >= START_FAILURES for slot in self._slots)


def _hopeless() -> NotReady:
    return NotReady("No worker can be started; the server's log says why.", retry_after=errors.RETRY_SECONDS)


def local_engine(settings: Settings, factory: RunnerFactory) -> LocalEngine:
    return LocalEngine(
        factory,
        settings.devices,
        queue_size=settings.queue_size,
        stop_seconds=settings.stop_seconds,
        patience=Patience(silence=settings.silence_seconds, stall=settings.stall_seconds, load=settings.load_seconds),
        quarantine_seconds=settings.quarantine_seconds,
        max_batch_size=settings.max_batch_size,
        batch_timeout=settings.batch_timeout,
    )
