"""A worker process as its supervisor has it, and what the two say to each other."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, TypeVar

from app.engine.types import AnyJob, Catalogue, DeviceMemory, IllegalTransition, JobResult
from app.errors import ServiceError
from models.base import Step

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """Draw these jobs, together if they are several; the end of each is reported by itself.

    `heard`: the ids of those whose every step somebody wants to hear of.
    """

    jobs: tuple[AnyJob, ...]
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
    """The state of a worker's device between two jobs. `plans`: where the networks of loaded models lie, by model."""

    kind: str
    name: str
    memory: DeviceMemory
    loaded: tuple[str, ...]
    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a worker is told at its birth. `avoid`: models that took earlier workers down, not to be loaded now."""

    heartbeat_seconds: float
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Known:
    """The models are known, though none is loaded yet; or they are others than those that were known."""

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
class Unavailable:
    """The model cannot be loaded; the worker serves the others. `detail` (a stack trace) is for the log."""

    model: str
    detail: str


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
    """`error` is what the client is answered, `detail` (a stack trace) for the log."""

    job_id: str
    error: ServiceError
    detail: str


Report = Known | Alive | Loading | Loaded | Unavailable | Ready | StartFailed | Progress | Free | Done | Failed

# A forked child would share the event loop's descriptors, and CUDA cannot be used in one.
PROCESSES = multiprocessing.get_context("spawn")
Child = BaseProcess
"""Of which `kill` may not be ignored."""
_Given = TypeVar("_Given")
_LAST_WORDS = 0.2  # seconds that a hung worker has to write where it hangs
_GLANCE = 0.005  # seconds between two looks whether something has ended
_REAPING = 10.0  # seconds after which a killed process that the kernel does not let go is left behind


def in_own_thread(name: str, call: Callable[..., _Given], *arguments: Any) -> asyncio.Future[_Given]:
    """What `call` returns. The event loop's own threads may all be busy for long, with what clients send."""
    pool = ThreadPoolExecutor(1, name)
    given = asyncio.get_running_loop().run_in_executor(pool, call, *arguments)
    pool.shutdown(wait=False)
    return given


class WorkerProcess:
    """Starts a worker, carries orders to it and reports from it; used once.

    `make` gives it, not started, the other end of the pipe. One thread of its own writes to the pipe and one reads:
    neither a picture of fifty megabytes nor a worker that doesn't listen holds up the event loop, and the loop's own
    threads, which decode what clients send, hold up no worker. `delivered`: when the last Run was in the pipe whole,
    on the monotonic clock; infinite while one is on its way.
    """

    def __init__(self, device: str, make: Callable[[Connection], Child]) -> None:
        self._device = device
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[Report | IllegalTransition | None] = asyncio.Queue()
        self._outbox: SimpleQueue[Order | None] = SimpleQueue()
        self._connection: Connection | None = None
        self._child: Child | None = None
        self._pid: int | None = None  # of the child that was
        self._launch: asyncio.Future[None] | None = None
        self._threads: list[threading.Thread] = []
        self._heard: float | None = None
        self._writing = math.inf  # since when the order that is being written is
        self.delivered = -math.inf

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else self._pid

    @property
    def silent_seconds(self) -> float:
        """Since the last report of whatever kind arrived; 0 before the first one: imports take what they take."""
        return 0.0 if self._heard is None else time.monotonic() - self._heard

    @property
    def deaf_seconds(self) -> float:
        """Since an order is being written to a worker that has not read it to its end; not above 0 when none is."""
        return time.monotonic() - self._writing

    async def start(self) -> None:
        """Raises OSError when the system has no process to give. May be cancelled; `stop` clears up."""
        ours, theirs = PROCESSES.Pipe(duplex=True)
        self._connection, self._child = ours, self._make(theirs)
        # Shielded: a thread cannot be cancelled, and a child that it starts afterwards would belong to nobody.
        self._launch = in_own_thread(f"start {self._device}", _start, self._child, theirs)
        await asyncio.shield(self._launch)
        for work, name in ((self._read, "read"), (self._write, "write")):
            thread = threading.Thread(target=work, args=(ours,), name=f"{name} {self._device}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def send(self, order: Order) -> None:
        """Orders arrive in the order sent. One to a dead worker is lost; its death is seen in `report`."""
        if isinstance(order, Run):
            self.delivered = math.inf
        self._outbox.put(order)

    async def report(self) -> Report | None:
        """What the worker says next; None: it is dead. Raises IllegalTransition for what is no report."""
        heard = await self._inbox.get()
        if isinstance(heard, IllegalTransition):
            raise heard
        return heard

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
        ended, child = True, self._child
        if child is not None and self.pid is not None:
            self.send(Stop())
            if not await _ended(child, seconds if self._threads else 0.0):
                child.kill()
                ended = await _ended(child, _REAPING)
        self._outbox.put(None)
        for thread in self._threads:
            ended = ended and await _ended(thread, _REAPING)
        if not ended:
            _log.error("worker device=%s pid=%s cannot be ended and is left behind", self._device, self.pid)
            return None
        if self._connection is not None:
            self._connection.close()  # only now: a descriptor closed under a reader may be given to another file
        if child is None:
            return None
        code, self._pid = child.exitcode, self.pid
        self._child = None
        if self._pid is not None:
            child.close()  # its descriptors would stay until the garbage collector finds it
        return code

    # Neither thread keeps what it has carried: there may be a hundred megabytes in it, and the next may come in hours.

    def _read(self, connection: Connection) -> None:
        while self._tell(_received(connection)):
            pass

    def _tell(self, report: Report | IllegalTransition | None) -> bool:
        """False: this was the last one."""
        self._heard = time.monotonic()  # here, so that a busy event loop is not taken for a silent worker
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, report)
        return report is not None

    def _write(self, connection: Connection) -> None:
        while self._deliver(connection, self._outbox.get()):
            pass

    def _deliver(self, connection: Connection, order: Order | None) -> bool:
        """False: there was none, and will be none."""
        if order is None:
            return False
        try:
            packed = ForkingPickler.dumps(order)
            self._writing = time.monotonic()
            with suppress(OSError):  # the worker died; `report` says so
                connection.send_bytes(packed)
        except Exception as error:  # noqa: BLE001  # what cannot be pickled raises anything, and its job must not wait for ever
            self._tell(IllegalTransition(f"an order cannot be written: {type(error).__name__}: {error}"))
        self._writing = math.inf
        if isinstance(order, Run):
            self.delivered = time.monotonic()
        return True


def _received(connection: Connection) -> Report | IllegalTransition | None:
    """None: nobody is at the other end."""
    try:
        report = connection.recv()
    except (EOFError, OSError):
        return None
    except Exception as error:  # noqa: BLE001  # bytes that are no pickle raise nearly anything
        return IllegalTransition(f"its words cannot be read: {type(error).__name__}: {error}")
    if not isinstance(report, Report):
        return IllegalTransition(f"it sent a {type(report).__name__}, which is no report")
    return report


def _start(child: Child, theirs: Connection) -> None:
    try:
        child.start()
    finally:
        theirs.close()  # a second holder of the worker's end would keep its death from being seen


async def _ended(one: Child | threading.Thread, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while one.is_alive():
        if time.monotonic() >= until:
            return False
        await asyncio.sleep(_GLANCE)
    return True


@atexit.register
def _leave_none() -> None:
    """multiprocessing would end those left with a SIGTERM, which workers ignore, and wait for them."""
    for child in multiprocessing.active_children():
        if child.name.startswith("worker "):
            child.kill()
