"""The process that owns a device: takes one job at a time, tells of each step, outlives bad jobs but not its parent."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Protocol

from app.engine.base import Catalogue, Job, JobResult, StepListener
from app.engine.memory import is_exhaustion
from app.engine.messages import (
    Alive,
    Cancel,
    Condition,
    Done,
    Failed,
    FailureKind,
    Known,
    Loaded,
    Loading,
    Order,
    Plan,
    Progress,
    Ready,
    Report,
    Run,
    StartFailed,
    Stop,
)
from cache import CacheError
from models.base import GenerationCancelled, LoadFailed, ModelError, Step, UnknownModel


class Runner(Protocol):
    """The models of one device."""

    def catalogue(self) -> Catalogue: ...

    def watch_loading(self, on_stage: Callable[[str, str], None]) -> None:
        """`on_stage` hears a model's name and the part of it that is loaded next."""
        ...

    def load(self, model: str) -> None:
        """Raises UnknownModel, LoadFailed."""
        ...

    def run(self, job: Job, on_step: StepListener) -> JobResult:
        """Lets whatever `on_step` raises pass; leaves nothing of the job behind in any case."""
        ...

    def condition(self) -> Condition: ...


RunnerFactory = Callable[[str], Runner]
"""Device name → runner. Pickled by reference into the worker process, so a module's function or a partial of one."""


class _ParentGone(Exception):
    """Nobody is at the other end of the pipe: the worker has nothing left to do."""


def main(connection: Connection, factory: RunnerFactory, device: str, plan: Plan) -> None:
    """Serve orders from `connection` until it closes or says Stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides when we end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so does the SIGTERM of some service managers: see process.py
    faulthandler.enable()  # a crash in native code says on stderr where it was
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # and so does a hang, before it is ended: see process.py
    _die_with_parent()
    serve(connection, factory, device, plan)


def serve(connection: Connection, factory: RunnerFactory, device: str, plan: Plan) -> None:
    line = _Line(connection)
    ended = threading.Event()
    # From the first moment on: importing and loading take long, and silence is what a hung worker is known by.
    threading.Thread(target=_beat, args=(line, ended, plan.heartbeat_seconds), name="heartbeat", daemon=True).start()
    try:
        runner = _start(line, factory, device, plan)
        if runner is not None:
            _Shift(line, runner).work()
    except _ParentGone:
        return
    finally:
        ended.set()


def _start(line: _Line, factory: RunnerFactory, device: str, plan: Plan) -> Runner | None:
    try:
        runner = factory(device)
        runner.watch_loading(lambda model, stage: line.say(Loading(model, stage)))
        catalogue = runner.catalogue()
        line.say(Known(catalogue))
        if catalogue.default not in plan.avoid:
            line.say(Loading(catalogue.default))
            runner.load(catalogue.default)
        line.say(Ready(runner.condition()))
    except _ParentGone:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a loader raises, the supervisor must be told why there is no worker
        line.say(StartFailed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        return None
    return runner


def _beat(line: _Line, ended: threading.Event, seconds: float) -> None:
    try:
        while not ended.wait(seconds):
            line.say(Alive())
    except _ParentGone:
        return


class _Line:
    """The worker's end of the pipe, which two of its threads speak into."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def say(self, report: Report) -> None:
        """Raises _ParentGone; whatever pickle raises for a report that it cannot carry."""
        packed = ForkingPickler.dumps(report)
        try:
            with self._lock:
                self._connection.send_bytes(packed)
        except OSError:
            raise _ParentGone from None

    def hear(self) -> Order:
        try:
            order: Order = self._connection.recv()
        except (EOFError, OSError):
            raise _ParentGone from None
        return order

    def pending(self) -> bool:
        try:
            return self._connection.poll()
        except (EOFError, OSError):
            raise _ParentGone from None


class _Shift:
    """One job after another."""

    def __init__(self, line: _Line, runner: Runner) -> None:
        self._line = line
        self._runner = runner
        self._stopped = False

    def work(self) -> None:
        while not self._stopped:
            match self._line.hear():
                case Run(job):
                    self._run(job)
                case Cancel():
                    pass  # its job was finished before this arrived
                case Stop():
                    return

    def _run(self, job: Job) -> None:
        try:
            if job.model not in self._runner.condition().loaded:
                self._line.say(Loading(job.model))
                self._runner.load(job.model)
                self._line.say(Loaded(job.model))
            result = self._runner.run(job, lambda step: self._stepped(job, step))
            _check(job, result)
            self._line.say(Done(job.id, result, self._runner.condition()))
        except _ParentGone:
            raise
        except Exception as error:  # noqa: BLE001  # a job may fail in any way; the worker answers for it and goes on
            kind = _kind_of(error)
            # A device that does not even tell its condition any more ends the process here, and gets a new one.
            field = error.field if isinstance(error, ModelError) else None
            self._line.say(Failed(job.id, kind, str(error), traceback.format_exc(), self._runner.condition(), field))

    def _stepped(self, job: Job, step: Step) -> None:
        self._line.say(Progress(job.id, step))
        while self._line.pending():
            match self._line.hear():
                case Cancel(job_id) if job_id == job.id:
                    raise GenerationCancelled
                case Stop():
                    self._stopped = True
                    raise GenerationCancelled


def _check(job: Job, result: object) -> None:
    """What a model made is looked at before it is called a success. Raises TypeError, ValueError."""
    if not isinstance(result, JobResult):
        raise TypeError(f"the runner answered with {type(result).__name__}, not with a result")
    if len(result.images) != len(job.params.seeds) or not all(result.images):
        raise ValueError(f"{len(result.images)} pictures for {len(job.params.seeds)} seeds, or empty ones")


def _kind_of(error: Exception) -> FailureKind:
    if isinstance(error, GenerationCancelled):
        return "cancelled"
    if isinstance(error, UnknownModel):
        return "unknown_model"
    if isinstance(error, LoadFailed):
        return "load_failed"
    if isinstance(error, ModelError):
        return "model_error"
    if isinstance(error, CacheError):
        return "incompatible"
    if is_exhaustion(error):
        return "out_of_memory"
    return "failed"


def _die_with_parent() -> None:
    """End at once when the parent does, even in the middle of a step or of a driver call that hangs."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
