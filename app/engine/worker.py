"""The process that owns a device: takes one job at a time, tells of each step, outlives bad jobs but not its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Protocol

from app.engine.base import Catalogue, Job, JobResult, StepListener
from app.engine.messages import Cancel, Condition, Done, Failed, FailureKind, Order, Progress, Ready, Run, StartFailed
from cache import CacheError
from models.base import GenerationCancelled, LoadFailed, ModelError, Step, UnknownModel


class Runner(Protocol):
    """The models of one device."""

    def catalogue(self) -> Catalogue: ...

    def load(self, model: str) -> None:
        """Raises UnknownModel, LoadFailed."""
        ...

    def run(self, job: Job, on_step: StepListener) -> JobResult:
        """Lets whatever `on_step` raises pass; leaves nothing of the job behind in any case."""
        ...

    def condition(self) -> Condition: ...


RunnerFactory = Callable[[str], Runner]
"""Device name → runner. Pickled by reference into the worker process, so a module's function or a partial of one."""


def main(connection: Connection, factory: RunnerFactory, device: str) -> None:
    """Serve orders from `connection` until it closes or says Stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides when we end
    _die_with_parent()
    try:
        runner = factory(device)
        catalogue = runner.catalogue()
        runner.load(catalogue.default)
        connection.send(Ready(catalogue, runner.condition()))
    except Exception as error:  # noqa: BLE001  # whatever a loader raises, the supervisor must be told why there is no worker
        connection.send(StartFailed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        return
    try:
        _serve(connection, runner)
    except (EOFError, OSError):
        return  # the parent is gone


def _serve(connection: Connection, runner: Runner) -> None:
    while True:
        match connection.recv():
            case Run(job):
                connection.send(_run(connection, runner, job))
            case Cancel():
                pass  # its job was finished before this arrived
            case _:
                return


def _run(connection: Connection, runner: Runner, job: Job) -> Done | Failed:
    def on_step(step: Step) -> None:
        connection.send(Progress(job.id, step))
        while connection.poll():
            order: Order = connection.recv()
            if isinstance(order, Cancel) and order.job_id == job.id:
                raise GenerationCancelled

    try:
        result = runner.run(job, on_step)
    except (EOFError, ConnectionError):
        raise
    except Exception as error:  # noqa: BLE001  # a job may fail in any way; the worker answers for it and goes on
        kind = _kind_of(error)
        return Failed(job.id, kind, str(error), traceback.format_exc(), runner.condition())
    return Done(job.id, result, runner.condition())


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
    # By name: torch need not be imported to be judged. Its CPU allocator raises a plain RuntimeError with these words.
    out_of_memory = any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)
    if out_of_memory or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
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
