"""The process that owns a device: takes a group of jobs, tells of each step, outlives bad jobs but not its parent."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Protocol

from app import errors
from app.engine import pipe
from app.engine.memory import is_exhaustion, lighten
from app.engine.pipe import Condition, Plan
from app.engine.types import NOT_LOADED, AnyJob, Catalogue, JobResult, StepsListener
from cache import CacheError
from models.base import Step
from models.errors import GenerationCancelled, LoadFailed, ModelError, RefinerFailed, UnknownModel

LOOK_SECONDS = 2.0  # between two looks at the folder of checkpoints
WARMING = "a first picture, for nobody"
Finish = Callable[[], JobResult]
"""Encodes a job's pictures; raises what the job failed of. Called once, in a thread of its own."""


class Runner(Protocol):
    """The models of one device."""

    def catalogue(self) -> Catalogue: ...

    def refresh(self) -> bool:
        """Whether models have come, changed or gone since the last call. Called in a thread of its own."""

    def watch_loading(self, on_stage: Callable[[str, str], None]) -> None:
        """`on_stage` hears a model's name and the part of it that is loaded next."""

    def load(self, model: str, beside: str | None = None) -> None:
        """beside: a loaded one that is used together with it. Raises UnknownModel, LoadFailed."""

    def warm(self, model: str) -> None:
        """Draw a short picture for nobody: what is made at the first use (kernels, tables, imports) is made now."""

    def draw(self, jobs: Sequence[AnyJob], on_steps: StepsListener) -> Sequence[Finish]:
        """Draw jobs of one kind (`queue.kind_of`), together if they are several; leave nothing of them behind.

        Each job's pictures, or its failure, come out of its `Finish`, in the jobs' order. What `on_steps` raises is
        the failure of the jobs that the step was told of. Raises what concerns all of them.
        """

    def condition(self) -> Condition: ...


RunnerFactory = Callable[[str], Runner]
"""Device name → runner. Pickled by reference into the worker process, so a module's function or a partial of one."""


class Spawn(Protocol):
    """Makes the process that serves the other end of `connection`; it is not started yet."""

    def __call__(self, connection: Connection, factory: RunnerFactory, device: str, plan: Plan) -> pipe.Child: ...


def spawn(connection: Connection, factory: RunnerFactory, device: str, plan: Plan) -> pipe.Child:
    return pipe.PROCESSES.Process(
        target=main, args=(connection, factory, device, plan), name=f"worker {device}", daemon=True
    )


class _ParentGone(Exception):
    """Nobody is at the other end of the pipe: the worker has nothing left to do."""


def main(connection: Connection, factory: RunnerFactory, device: str, plan: Plan) -> None:
    """Serve orders from `connection` until it closes or says Stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides when we end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so does the SIGTERM of some service managers: see pipe.py
    faulthandler.enable()  # a crash in native code says on stderr where it was
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # and so does a hang, before it is ended: see pipe.py
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
            threading.Thread(target=_look, args=(line, ended, runner), name="models-watch", daemon=True).start()
            _Shift(line, runner, plan.heartbeat_seconds).work()
    except _ParentGone:
        return
    finally:
        ended.set()


def _start(line: _Line, factory: RunnerFactory, device: str, plan: Plan) -> Runner | None:
    try:
        runner = factory(device)
        runner.watch_loading(lambda model, stage: line.say(pipe.Loading(model, stage)))
        catalogue = runner.catalogue()
        line.say(pipe.Known(catalogue))
        if catalogue.default not in plan.avoid:
            try:
                _load(line, runner, catalogue.default)
                line.say(pipe.Loading(catalogue.default, WARMING))
                runner.warm(catalogue.default)
                line.say(pipe.Loaded(catalogue.default))
            except LoadFailed:
                if all(info.error for name, info in catalogue.models.items() if name != catalogue.default):
                    raise  # there is nothing to serve instead
        line.say(pipe.Ready(runner.condition()))
    except _ParentGone:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a loader raises, the supervisor must be told why there is no worker
        line.say(pipe.StartFailed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        return None
    return runner


def _load(line: _Line, runner: Runner, model: str, *beside: str) -> None:
    """Tells of it. Raises UnknownModel; LoadFailed, whatever it was that went wrong."""
    line.say(pipe.Loading(model))
    try:
        runner.load(model, *beside)
    except (_ParentGone, UnknownModel):
        raise
    except Exception as error:  # noqa: BLE001  # whatever a loader raises; the other models are served on
        detail, message = traceback.format_exc(), f"{type(error).__name__}: {error}"
        lighten(error)
    else:
        line.say(pipe.Loaded(model))
        return
    line.say(pipe.Unavailable(model, detail))
    raise (RefinerFailed if beside else LoadFailed)(message)


def _beat(line: _Line, ended: threading.Event, seconds: float) -> None:
    try:
        while not ended.wait(seconds):
            line.say(pipe.Alive())
    except _ParentGone:
        return


def _look(line: _Line, ended: threading.Event, runner: Runner) -> None:
    """Tell of models that come and go while the worker runs."""
    try:
        while not ended.wait(LOOK_SECONDS):
            if runner.refresh():
                line.say(pipe.Known(runner.catalogue()))
    except _ParentGone:
        return


class _Line:
    """The worker's end of the pipe, which three of its threads speak into."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def say(self, report: pipe.Report) -> None:
        """Raises _ParentGone; whatever pickle raises for a report that it cannot carry."""
        packed = ForkingPickler.dumps(report)
        try:
            with self._lock:
                self._connection.send_bytes(packed)
        except OSError:
            raise _ParentGone from None

    def hear(self) -> pipe.Order:
        try:
            order: pipe.Order = self._connection.recv()
        except (EOFError, OSError):
            raise _ParentGone from None
        return order

    def pending(self) -> bool:
        try:
            return self._connection.poll()
        except (EOFError, OSError):
            raise _ParentGone from None


class _Shift:
    """One group of jobs after another; while one is drawn, the pictures of the one before are encoded.

    quiet: seconds for which steps that nobody wants to hear of go unsaid. Each report wakes the server's process, and
    on a CPU takes it from the threads that draw: a millisecond a step, see docs/decisions/service-cost.md.
    """

    def __init__(self, line: _Line, runner: Runner, quiet: float) -> None:
        self._line = line
        self._runner = runner
        self._stopped = False
        self._at_hand: set[str] = set()  # jobs whose end was not reported yet
        self._given_up: set[str] = set()  # of them
        self._heard: frozenset[str] = frozenset()  # of those that are drawn, see `Run`
        self._quiet = quiet
        self._said = 0.0  # when a sign of progress was given last, on the monotonic clock
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._encoding: Future[None] | None = None

    def work(self) -> None:
        try:
            while not self._stopped:
                match self._line.hear():
                    case pipe.Run(jobs, heard):
                        self._heard = heard
                        self._run(jobs)
                    case order:
                        self._obey(order)
        finally:
            self._encoder.shutdown(wait=False, cancel_futures=True)

    def _run(self, jobs: tuple[AnyJob, ...]) -> None:
        self._at_hand.update(job.id for job in jobs)
        finishes: Sequence[Finish]
        try:
            models = jobs[0].models
            for place, model in enumerate(models):
                if model not in self._runner.condition().loaded:
                    _load(self._line, self._runner, model, *models[:place])
            self._said = time.monotonic()
            finishes = self._runner.draw(jobs, self._stepped)
        except _ParentGone:
            raise
        except Exception as error:  # noqa: BLE001  # jobs may fail in any way; the worker answers for them and goes on
            finishes = [partial(_raise, error)] * len(jobs)
        if self._encoding is not None:
            self._encoding.result()  # one group ahead is enough: pictures take memory
        # A device that does not even tell its condition any more ends the process here, and gets a new one.
        self._line.say(pipe.Free(self._runner.condition()))
        self._encoding = self._encoder.submit(self._finish, jobs, finishes)

    def _finish(self, jobs: Sequence[AnyJob], finishes: Sequence[Finish]) -> None:
        """In the encoder's thread."""
        for job, finish in zip(jobs, finishes, strict=True):
            try:
                if job.id in self._given_up:
                    raise GenerationCancelled
                result = finish()
                _check(job, result)
                self._line.say(pipe.Done(job.id, result))
            except _ParentGone:
                raise
            except Exception as error:  # noqa: BLE001  # as above
                self._line.say(pipe.Failed(job.id, _answer(error), "".join(traceback.format_exception(error))))
            self._at_hand.discard(job.id)
            self._given_up.discard(job.id)

    def _stepped(self, steps: Mapping[str, Step]) -> None:
        """Raises GenerationCancelled when nobody waits any more for what is being drawn."""
        heard = {job_id: step for job_id, step in steps.items() if job_id in self._heard - self._given_up}
        if heard or time.monotonic() - self._said >= self._quiet:
            self._line.say(pipe.Progress(heard))
            self._said = time.monotonic()
        while self._line.pending():
            self._obey(self._line.hear())
        if self._stopped or self._given_up.issuperset(steps):
            raise GenerationCancelled

    def _obey(self, order: pipe.Order) -> None:
        match order:
            case pipe.Cancel(job_id) if job_id in self._at_hand:  # else it was finished before this arrived
                self._given_up.add(job_id)
            case pipe.Stop():
                self._stopped = True


def _raise(error: Exception) -> JobResult:
    raise error


def _check(job: AnyJob, result: object) -> None:
    """What a model made is looked at before it is called a success. Raises TypeError, ValueError."""
    if not isinstance(result, JobResult):
        raise TypeError(f"the runner answered with {type(result).__name__}, not with a result")
    if len(result.images) != job.images or not all(result.images):
        raise ValueError(f"{len(result.images)} pictures for {job.images}, or empty ones")


def _answer(error: Exception) -> errors.ServiceError:
    """What the client is told of it."""
    match error:
        case GenerationCancelled():
            return errors.Cancelled("The job was cancelled.")
        case UnknownModel():
            return errors.ModelNotFound(str(error), field="model")
        case LoadFailed():  # its own message names folders of this machine
            told = f"The model is configured. {NOT_LOADED} Ask for another one."
            return errors.ModelUnavailable(told, field=error.field or "model", retry_after=errors.RETRY_SECONDS)
        case ModelError():
            return errors.Invalid(str(error), field=error.field)
        case CacheError():
            return errors.Incompatible(str(error))
    if is_exhaustion(error):
        return errors.OutOfMemory(
            "The device ran out of memory. Lower batch_size, width or height, or deepcache_depth, "
            "or turn off other features that hold memory.",
            retry_after=errors.RETRY_SECONDS,
        )
    return errors.GenerationFailed("The model failed on this request; the server's log has the cause.")


def _die_with_parent() -> None:
    """End at once when the parent does, even in the middle of a step or of a driver call that hangs."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
