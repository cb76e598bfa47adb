"""A device with whatever worker it has at the moment; when that worker is given up, and a model kept from all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from app.engine.pipe import Condition, Order, WorkerProcess
from app.engine.types import WORKER_MOVES, DeviceMemory, DeviceStatus, IllegalTransition, JobHandle, WorkerState, moved
from app.errors import ModelUnavailable

_log = logging.getLogger(__name__)

SILENCE = 1.5  # seconds of starting or loading, after which the log says again what goes on
CRASHES = 2  # in a row; one alone may be a stranger's doing, such as a process killed by hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a worker is believed in, in seconds.

    `silence`: without a sign of life from its process, whatever it does. A thread of the worker gives one a few times
    in that time, so only a process that cannot run Python at all is silent: stopped, or stuck in native code that holds
    the interpreter's lock. So long may it also take to read one order. `stall`: a job that it has been handed, without
    a finished step, though the process lives. `load`: one stage of loading a model, during which there are no steps,
    or of coming up.
    """

    silence: float = 60.0
    stall: float = 600.0
    load: float = 1800.0

    @property
    def heartbeat(self) -> float:
        """Between two signs of life, and of progress where steps are not told of one by one.

        Several fit into `silence` and `stall`, so that one that is late costs nothing.
        """
        return min(self.silence / 6, self.stall / 6, 5.0)

    @property
    def look(self) -> float:
        """Between two looks at a worker."""
        return min(self.silence, self.stall, self.load, 4.0) / 4


class Quarantine:
    """`seconds` later a model may be tried again: memory that was short may be there by then."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._crashes: dict[str, int] = {}
        self._held: dict[str, tuple[str, float]] = {}

    def crashed(self, model: str, reason: str) -> bool:
        """A worker was lost while it loaded `model`; `reason` is a clause for everyone. True: now it is held."""
        self._crashes[model] = self._crashes.get(model, 0) + 1
        if self._crashes[model] < CRASHES:
            return False
        why = f"Its worker was lost twice in a row while loading it: {reason}."
        self._held[model] = why, time.monotonic() + self._seconds
        self._crashes[model] = CRASHES - 1  # when it is tried again, one crash suffices
        return True

    def loaded(self, model: str) -> None:
        self._crashes.pop(model, None)
        self._held.pop(model, None)

    @property
    def reasons(self) -> Mapping[str, str]:
        """Model → why it is held."""
        now = time.monotonic()
        self._held = {model: held for model, held in self._held.items() if held[1] > now}
        return {model: reason for model, (reason, _) in self._held.items()}

    def refusal(self, model: str) -> ModelUnavailable:
        why, until = self._held.get(model, ("", 0.0))
        return ModelUnavailable(
            f"{model} is not given to any worker at present. {why} Ask for another model, or again later.",
            field="model",
            retry_after=max(1, round(until - time.monotonic())),
        )


class Slot:
    """`device` is the name that the operator gave; `restarts` counts the workers after the first."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.state = WorkerState.STARTING
        self.process: WorkerProcess | None = None
        self.running: list[JobHandle] = []  # what its worker draws
        self.finishing: list[JobHandle] = []  # what it has drawn and not reported the end of
        self.loading: str | None = None  # the model
        self.stage = ""  # the part of it
        self.condition: Condition | None = None
        self.unavailable: dict[str, str] = {}  # models that its worker could not load, each with the reason
        self.up = False  # its worker has come up and is not lost since
        self.fault: str | None = None  # why the worker that is being ended now is given up
        self.reason: str | None = None  # why the last one was lost
        self.restarts = 0
        self.deaths = 0  # since the last job that was finished; the exponent of the pause before the next start
        self.start_failures = 0  # in a row
        self._advanced = time.monotonic()

    def move(self, state: WorkerState) -> None:
        """Raises IllegalTransition."""
        if state is not self.state:
            self.state = moved(WORKER_MOVES, self.state, state)

    def settle(self, draining: bool) -> None:
        """Into the state that follows from what the worker has to do."""
        if not self.up:
            if self.loading is not None:
                self.move(WorkerState.LOADING)
        elif draining:
            self.move(WorkerState.DRAINING)
        elif self.loading is not None:
            self.move(WorkerState.LOADING)
        else:
            self.move(WorkerState.BUSY if self.jobs else WorkerState.READY)

    def send(self, order: Order) -> None:
        """To its worker, if there is one."""
        if self.process is not None:
            self.process.send(order)

    def learn(self, condition: Condition) -> None:
        """Its worker has told of itself."""
        self.condition = condition
        self.unavailable = {model: why for model, why in self.unavailable.items() if model not in condition.loaded}

    @property
    def jobs(self) -> list[JobHandle]:
        """All that the worker has."""
        return [*self.finishing, *self.running]

    def drawn(self) -> None:
        """It has drawn what it had. Raises IllegalTransition when that is nothing."""
        if not self.running:
            raise IllegalTransition("free without having had a job")
        self.finishing += self.running
        self.running = []

    def finish(self, job_id: str) -> JobHandle:
        """The job has ended. Raises IllegalTransition when that is none that was drawn."""
        for handle in self.finishing:
            if handle.job.id == job_id:
                self.finishing.remove(handle)
                return handle
        raise IllegalTransition("the end of a job that it has not drawn")

    @property
    def free(self) -> bool:
        """Its worker can be handed jobs."""
        return self.up and self.process is not None and not self.running and self.fault is None

    def advance(self) -> None:
        """The worker got on: it came up, got a job, finished a step or a load."""
        self._advanced = time.monotonic()

    def overdue(self, patience: Patience) -> str | None:
        """Why the worker is to be given up now, if it is."""
        if self.process is None:
            return None
        if self.process.silent_seconds > patience.silence:
            return "it gave no sign of life"
        if self.process.deaf_seconds > patience.silence:
            return "it does not read what it is told"
        waited = time.monotonic() - max(self._advanced, self.process.delivered)
        if self.loading is not None:
            return f"loading {self.loading} took too long" if waited > patience.load else None
        if not self.up:
            return "it did not come up" if waited > patience.load else None
        # The last step may be one that was not told of: it was done up to a heartbeat later than what was.
        return "its job finished no step" if self.jobs and waited > patience.stall + patience.heartbeat else None

    async def watch(self, process: WorkerProcess, patience: Patience) -> None:
        """Kill its worker when it hangs; whoever reads its reports sees it die."""
        said = time.monotonic()
        while (fault := self.overdue(patience)) is None:
            await asyncio.sleep(patience.look)
            if (not self.up or self.loading is not None) and time.monotonic() - said >= SILENCE:
                said = time.monotonic()
                doing = f"loading {self._loads}" if self.loading else "starting"
                _log.info("worker device=%s: still %s", self.device, doing)
        self.fault = fault
        _log.error("worker device=%s pid=%s hangs: %s", self.device, process.pid, fault)
        await process.kill()

    @property
    def _loads(self) -> str | None:
        return f"{self.loading}: {self.stage}" if self.loading and self.stage else self.loading

    def status(self) -> DeviceStatus:
        condition = self.condition
        return DeviceStatus(
            device=self.device,
            kind=condition.kind if condition else self.device.split(":")[0],
            name=condition.name if condition else self.device,
            state=self.state,
            pid=self.process.pid if self.process else None,
            restarts=self.restarts,
            memory=condition.memory if condition and self.up else DeviceMemory(),
            loaded=condition.loaded if condition and self.up else (),
            plans=condition.plans if condition and self.up else {},
            loading=self._loads,
            up=self.up,
            reason=self.reason,
        )


def death(code: int | None) -> str:
    """How a process ended, in words for everyone. A negative code is the number of the signal that ended it."""
    if code == -9:
        return "the system killed it (signal 9), as it does when memory runs out"
    if code is not None and code < 0:
        return f"it crashed (signal {-code})"
    return f"it ended with exit code {code}"
