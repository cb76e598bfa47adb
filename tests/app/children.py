"""Workers as threads of the test, whose models wait for its word before each step: every interleaving can be made.

The real worker code speaks to the real supervisor over a real pipe; only the process around the worker is missing.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from app.engine import worker
from app.engine.pipe import Plan, Progress
from app.engine.runner import RegistryRunner
from app.engine.supervisor import LocalEngine
from app.engine.worker import RunnerFactory
from cache import CacheStrategy
from models.base import Generation, GenerationParams, Step, StepHook
from tests.app.fakes import FakeModel, FakeRegistry
from tests.app.test_engine import started, until

PATIENCE = 30.0  # seconds; only keeps a broken test from hanging
_pids = itertools.count(10**7)  # no process has such a number


class Killed(BaseException):
    """What SIGKILL is to a process: no code of the worker catches it."""


class Gate:
    """Where a worker waits before each thing it does; `at` names that thing, None while it is busy or idle."""

    def __init__(self) -> None:
        self.at: str | None = None
        self.passed: list[str] = []
        self._killed = False
        self._permits = 0
        self._changed = threading.Condition()

    def open(self, times: int = 1) -> None:
        with self._changed:
            self._permits += times
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._permits = 0

    def kill(self) -> None:
        with self._changed:
            self._killed = True
            self._changed.notify_all()

    def wait(self, thing: str) -> None:
        with self._changed:
            self.at = thing
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._permits or self._killed)
            self.at = None
            if self._killed:
                raise Killed
            self._permits -= 1
            self.passed.append(thing)


class GatedModel(FakeModel):
    """Its text, steps and decoding each wait at the gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def step(self, index: int) -> None:
        self._gate.wait(f"step {index}")

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        self._gate.wait("text")
        generation = super().generate(params, strategy, on_step)
        self._gate.wait("decode")
        return generation


class GatedRegistry(FakeRegistry):
    """`fine` and `flux` are gated once they are loaded; loading `slow` waits at the gate too."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def get(self, name: str, beside: str | None = None) -> Any:
        if name == "slow" and name not in self._loaded:
            self._gate.wait("load")
        if name in ("fine", "flux", "slow"):
            return self._loaded.setdefault(name, GatedModel(self._gate))
        return super().get(name)


class ColdRunner(RegistryRunner):
    """Draws nothing for nobody: its models would wait for the test's word."""

    def warm(self, model: str) -> None:
        pass


class ThreadChild:
    """As a process is to the supervisor: started, killed at whatever it waits for, and its pipe closes with it."""

    def __init__(self, connection: Connection, device: str, plan: Plan) -> None:
        self.gate = Gate()
        self.pid: int | None = None
        self.exitcode: int | None = None
        self.sent: list[object] = []  # every report, in order, right after it went into the pipe
        self._said = threading.Condition()
        self._theirs = connection
        self._connection: _Tapped | None = None
        self._device = device
        self._plan = plan
        self._thread = threading.Thread(target=self._live, name="thread child", daemon=True)

    def start(self) -> None:
        self._connection = _Tapped(os.dup(self._theirs.fileno()), self._heard)
        self.pid = next(_pids)
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        if self._connection is None:
            return  # not started: there is nothing to kill
        self.exitcode = -9
        self.gate.kill()
        try:
            with socket.socket(fileno=os.dup(self._connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)  # wakes whoever reads it, on both ends
        except OSError:
            return  # it is closed: the thread has ended by itself

    def close(self) -> None:
        pass

    def speak(self, words: bytes) -> None:
        """Something of the test's own into the pipe, in the worker's name."""
        assert self._connection is not None
        Connection.send_bytes(self._connection, words)

    def has_orders(self) -> bool:
        """Something is in the pipe that the worker has not read."""
        assert self._connection is not None
        return self._connection.poll()

    def wait_sent(self, kind: type, job_id: str) -> None:
        """Blocks until that report is in the pipe, whether anybody has read it or not."""
        with self._said:
            assert self._said.wait_for(
                lambda: any(isinstance(report, kind) and report.job_id == job_id for report in self.sent),  # type: ignore[attr-defined]
                PATIENCE,
            )

    def told(self, job_id: str) -> list[Step]:
        """The steps of that job that it has told of."""
        return [one.steps[job_id] for one in self.sent if isinstance(one, Progress) and job_id in one.steps]

    def _heard(self, report: object) -> None:
        with self._said:
            self.sent.append(report)
            self._said.notify_all()

    def _live(self) -> None:
        assert self._connection is not None
        try:
            runner = ColdRunner(GatedRegistry(self.gate), "a thread")
            worker.serve(self._connection, lambda device: runner, self._device, self._plan)
        except Killed:
            pass
        finally:
            self._connection.close()
            self.exitcode = self.exitcode or 0


class _Tapped(Connection):
    def __init__(self, handle: int, heard: Callable[[object], None]) -> None:
        super().__init__(handle)
        self._heard = heard

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
        super().send_bytes(buf, offset, size)
        self._heard(ForkingPickler.loads(bytes(buf)))


@dataclass
class Nursery:
    """Makes an engine whose workers are threads, and keeps them to be looked at."""

    children: list[ThreadChild] = field(default_factory=list)

    def make(self, connection: Connection, factory: RunnerFactory, device: str, plan: Plan) -> ThreadChild:
        self.children.append(ThreadChild(connection, device, plan))
        return self.children[-1]

    @property
    def child(self) -> ThreadChild:
        return self.children[-1]

    @property
    def gate(self) -> Gate:
        return self.child.gate

    async def reach(self, thing: str) -> None:
        """Let the worker come to `thing`, no further."""
        while True:
            await until(lambda: self.gate.at is not None)
            if self.gate.at == thing:
                return
            before = len(self.gate.passed)
            self.gate.open()
            await until(lambda before=before: len(self.gate.passed) > before)

    def engine(self, **options: Any) -> LocalEngine:
        options = {"stop_seconds": 0.0, "backoff": (0.0, 0.0), **options}
        return LocalEngine(never_called, ["cpu"], make=self.make, **options)

    def working(self, **options: Any) -> AbstractAsyncContextManager[LocalEngine]:
        return started(self.engine(**options))


def never_called(device: str) -> RegistryRunner:
    raise AssertionError("a thread makes its own runner")
