"""A worker process as its supervisor has it, and what the two say to each other."""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal, Protocol, get_args

from app.engine.types import Catalogue, DeviceMemory, Job, JobResult
from models.base import Step

_log = logging.getLogger(__name__)

FailureKind = Literal[
    "cancelled", "unknown_model", "load_failed", "model_error", "incompatible", "out_of_memory", "failed"
]


@dataclass(frozen=True, slots=True)
class Run:
    """Draw these jobs, together if they are several; the end of each is reported by itself.

    `heard`: the ids of those whose every step somebody wants to hear of.
    """

    jobs: tuple[Job, ...]
    heard: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop this job at its next step; no other job is ever meant, however late this arrives.

    A job that is drawn together with others is drawn on for their sake, and its pictures are dropped.
    """

    job_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End, at the next step if a job runs: it has been answered already."""


Order = Run | Cancel | Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """The state of a worker's device between two jobs."""

    kind: str
    name: str
    memory: DeviceMemory
    loaded: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a worker is told at its birth. `avoid`: models that took earlier workers down, not to be loaded now."""

    heartbeat_seconds: float
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Known:
    """The models are known, though none is loaded yet."""

    catalogue: Catalogue


@dataclass(frozen=True, slots=True)
class Alive:
    """The process runs Python. Says nothing on whether its job gets on: that is what steps are for."""


@dataclass(frozen=True, slots=True)
class Loading:
    """A model is being loaded, for a job or before the first one; no step will be heard meanwhile.

    `stage` says in a few words which part of it comes next; empty at the beginning.
    """

    model: str
    stage: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The job's model is there; the job itself begins."""

    model: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A job can run."""

    condition: Condition


@dataclass(frozen=True, slots=True)
class StartFailed:
    message: str
    detail: str


@dataclass(frozen=True, slots=True)
class Progress:
    """A step is done, and what it was to each job that is heard, by its id. Of others it is told now and then only."""

    steps: Mapping[str, Step]


@dataclass(frozen=True, slots=True)
class Free:
    """What the worker had is drawn, or failed, and it can take other jobs; the ends of those it had follow."""

    condition: Condition


@dataclass(frozen=True, slots=True)
class Done:
    job_id: str
    result: JobResult


@dataclass(frozen=True, slots=True)
class Failed:
    """`message` is for the client, `detail` (a stack trace) for the log; `field` of the request is at fault, if any."""

    job_id: str
    kind: FailureKind
    message: str
    detail: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class Garbled:
    """What the worker sent is no report; made on the supervisor's side."""

    detail: str


Report = Known | Alive | Loading | Loaded | Ready | StartFailed | Progress | Free | Done | Failed | Garbled

# A forked child would share the event loop's descriptors, and CUDA cannot be used in one.
PROCESSES = multiprocessing.get_context("spawn")
_REPORTS = get_args(Report)
_LAST_WORDS = 0.2  # seconds that a hung worker has to write where it hangs
_REAPING = 10.0  # seconds after which a killed process that the kernel does not let go is left behind


class Child(Protocol):
    """What of a process is used here; `kill` may not be ignored."""

    @property
    def pid(self) -> int | None: ...
    @property
    def exitcode(self) -> int | None: ...
    def start(self) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


class WorkerProcess:
    """Starts a worker, carries orders to it and reports from it; used once.

    `make` gives it, not started, the other end of the pipe. A thread of its own reads the pipe, and orders are written
    in threads, one at a time: a result of a hundred megabytes or a worker that doesn't listen never holds up the event
    loop.
    """

    def __init__(self, device: str, make: Callable[[Connection], Child]) -> None:
        self._device = device
        self._make = make
        self._inbox: asyncio.Queue[Report | None] = asyncio.Queue()
        self._outbox: asyncio.Queue[Order] = asyncio.Queue()
        self._connection: Connection | None = None
        self._child: Child | None = None
        self._pid: int | None = None  # of the child that was
        self._reader: threading.Thread | None = None
        self._writer: asyncio.Task[None] | None = None
        self._launch: asyncio.Task[None] | None = None
        self._heard: float | None = None

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else self._pid

    @property
    def silent_seconds(self) -> float:
        """Since the last report of whatever kind arrived; 0 before the first one: imports take what they take."""
        return 0.0 if self._heard is None else time.monotonic() - self._heard

    async def start(self) -> None:
        """Raises OSError when the system has no process to give. May be cancelled; `stop` clears up."""
        ours, theirs = PROCESSES.Pipe(duplex=True)
        child = self._make(theirs)
        self._connection = ours
        self._child = child
        # Shielded: a thread cannot be cancelled, and a child that it starts afterwards would belong to nobody.
        self._launch = asyncio.create_task(asyncio.to_thread(_start, child, theirs))
        await asyncio.shield(self._launch)
        loop = asyncio.get_running_loop()
        self._reader = threading.Thread(target=self._read, args=(ours, loop), name=f"read {self._device}", daemon=True)
        self._reader.start()
        self._writer = loop.create_task(self._write(ours))

    def send(self, order: Order) -> None:
        """Orders arrive in the order sent. One to a dead worker is lost; its death is seen in `reports`."""
        self._outbox.put_nowait(order)

    async def reports(self) -> AsyncIterator[Report]:
        """What the worker says, until it dies."""
        while (report := await self._inbox.get()) is not None:
            yield report

    async def kill(self) -> None:
        """End a worker that does not answer; before that it writes to stderr where each of its threads stands."""
        child = self._child
        if child is None or not child.is_alive():
            return
        if self.pid is not None and self.pid != os.getpid() and hasattr(signal, "SIGUSR1"):
            with suppress(OSError):
                os.kill(self.pid, signal.SIGUSR1)
            await asyncio.sleep(_LAST_WORDS)
        child.kill()

    async def stop(self, seconds: float) -> int | None:
        """Ask the worker to end, kill it after `seconds`; return its exit code. Also clears up after a dead one."""
        if self._launch is not None:
            await asyncio.wait({self._launch})
        ended = True
        if self.pid is not None and self._child is not None:
            self.send(Stop())
            ended = await asyncio.to_thread(_end, self._child, seconds if self._writer is not None else 0.0)
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        if not ended:
            _log.error("worker device=%s pid=%s cannot be ended and is left behind", self._device, self.pid)
            return None
        if self._reader is not None:
            await asyncio.to_thread(self._reader.join)
        if self._connection is not None:
            self._connection.close()  # only now: a descriptor closed under a reader may be given to another file
        if self._child is None:
            return None
        code, self._pid, child = self._child.exitcode, self.pid, self._child
        self._child = None
        if self._pid is not None:
            child.close()  # its descriptors would stay until the garbage collector finds it
        return code

    def _read(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        report: Report | None
        while True:
            try:
                report = connection.recv()
                if not isinstance(report, _REPORTS):
                    report = Garbled(f"a {type(report).__name__}, which is no report")
            except (EOFError, OSError):
                report = None
            except Exception as error:  # noqa: BLE001  # bytes that are no pickle raise nearly anything
                report = Garbled(f"{type(error).__name__}: {error}")
            self._heard = time.monotonic()  # here, so that a busy event loop is not taken for a silent worker
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._inbox.put_nowait, report)
            if report is None:
                return

    async def _write(self, connection: Connection) -> None:
        while True:
            order = await self._outbox.get()
            with suppress(OSError):  # the worker died; `reports` ends
                await asyncio.to_thread(connection.send, order)


def _start(child: Child, theirs: Connection) -> None:
    try:
        child.start()
    finally:
        theirs.close()  # a second holder of the worker's end would keep its death from being seen


def _end(child: Child, seconds: float) -> bool:
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join(_REAPING)
    return not child.is_alive()


@atexit.register
def _leave_none() -> None:
    """multiprocessing would end those left with a SIGTERM, which workers ignore, and wait for them."""
    for child in multiprocessing.active_children():
        if child.name.startswith("worker "):
            child.kill()
