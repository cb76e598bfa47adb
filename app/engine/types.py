"""What an engine is: jobs go in, results come out; which process runs them is its own affair.

Nothing here imports torch: these types cross between the HTTP process and the workers.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar

from app.errors import ServiceError
from app.images import OutputFormat
from cache import CacheStrategy, NoCache
from models.base import CacheName, Enlargement, GenerationParams, Step, Timings
from models.tuning.profile import Profile

ATTEMPTS = 2  # a job whose worker is lost is tried once more: the loss may not have been its doing
NOT_LOADED = "Its files do not load; the server's log says why."

CacheSummary = Mapping[str, object]  # JSON values only
StepListener = Callable[[Step], None]
StepsListener = Callable[[Mapping[str, Step]], None]
"""Hears a step of a batch: what it was to each of the jobs in it, by their ids."""


class WorkerState(StrEnum):
    """`failed`: gone, and another is started after a pause. `draining`: what was accepted is finished, nothing else."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    DRAINING = "draining"
    FAILED = "failed"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class IllegalTransition(RuntimeError):
    """A state was to follow one that it cannot follow."""


_W, _J = WorkerState, JobState

WORKER_MOVES: Mapping[WorkerState, frozenset[WorkerState]] = {
    _W.STARTING: frozenset({_W.LOADING, _W.READY, _W.BUSY, _W.DRAINING, _W.FAILED}),
    _W.LOADING: frozenset({_W.READY, _W.BUSY, _W.DRAINING, _W.FAILED}),
    _W.READY: frozenset({_W.BUSY, _W.DRAINING, _W.FAILED}),
    _W.BUSY: frozenset({_W.LOADING, _W.READY, _W.DRAINING, _W.FAILED}),
    _W.DRAINING: frozenset({_W.FAILED}),
    _W.FAILED: frozenset({_W.STARTING}),
}
JOB_MOVES: Mapping[JobState, frozenset[JobState]] = {
    _J.QUEUED: frozenset({_J.RUNNING, _J.FAILED, _J.CANCELLED}),
    _J.RUNNING: frozenset({_J.QUEUED, _J.DONE, _J.FAILED, _J.CANCELLED}),  # queued again: its worker was lost
    **dict.fromkeys((_J.DONE, _J.FAILED, _J.CANCELLED), frozenset()),
}

State = TypeVar("State", WorkerState, JobState)
Outcome = TypeVar("Outcome")


def moved(moves: Mapping[State, frozenset[State]], old: State, new: State) -> State:
    """`new`, if it may follow `old`. Raises IllegalTransition."""
    if new not in moves[old]:
        raise IllegalTransition(f"{type(old).__name__}: {new.value} cannot follow {old.value}")
    return new


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One validated request. `warnings`: its sentences for the user; `chosen`: what became of a wished speed.

    `deadline_seconds` after it was accepted a job is given up, wherever it is by then; None: never.
    """

    id: str
    model: str
    params: GenerationParams
    strategy: CacheStrategy
    output_format: OutputFormat = "png"
    chosen: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    deadline_seconds: float | None = None

    @property
    def images(self) -> int:
        return len(self.params.seeds)

    @property
    def models(self) -> tuple[str, ...]:
        """All that it needs, by name: `model`, and a refiner."""
        return (self.model,) if self.params.refiner is None else (self.model, self.params.refiner.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpscaleJob:
    """Pictures to be enlarged. It needs no model, so any worker that is up takes it. The rest as in Job."""

    id: str
    work: Enlargement
    deadline_seconds: float | None = None
    model: ClassVar[None] = None
    models: ClassVar[tuple[str, ...]] = ()
    strategy: ClassVar[CacheStrategy] = NoCache()
    output_format: ClassVar[OutputFormat] = "png"

    @property
    def images(self) -> int:
        return len(self.work.pictures)


AnyJob = Job | UpscaleJob


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """Encoded pictures, one a seed, and what is to be said about them. `cache` is the contract's report.

    `batches`: how many images were denoised together in each; one that several jobs share stands with one of them, so
    that a sum counts it once. `sampling`: sampler and scheduler that drew, if known. `size`: where it is not as asked.
    `reused_runs`: those that an earlier job had made; `spared_calls`: the calls in them, computed and reused.
    """

    images: tuple[bytes, ...]
    cache: CacheSummary
    timings: Timings
    batches: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    attention: str = "sdpa"
    sampling: tuple[str, str] | None = None
    size: tuple[int, int] | None = None
    reused_runs: int = 0
    spared_calls: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A place where DeepCache can cut the model; `reuse_cost` is a reuse step's share of a full one."""

    branch: int
    reuse_cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a request has to know of a model to be checked against it.

    Sizes are in pixels, (width, height); `render_sizes` are those it draws at before resampling, if it is so bound.
    `attention` (by kernel), `compilation` and `error` say why it cannot be run so, compiled or loaded; None: it can.
    `inpaints`: its network was trained to draw within a mask. `distilled`: by what it draws in few steps, if it does.
    `profile` has the seconds of this device alone.
    """

    name: str
    family: str
    native_size: tuple[int, int]
    size_multiple: int
    cache: CacheName
    steps: int
    guidance_scale: float
    samplers: Mapping[str, tuple[str, ...]]
    branches: tuple[Branch, ...] = ()
    render_sizes: tuple[tuple[int, int], ...] = ()
    inpaints: bool = False
    attention: Mapping[str, str | None] = field(default_factory=dict)
    compilation: str | None = None
    distilled: str | None = None
    error: str | None = None
    profile: Profile = field(default_factory=Profile)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """The models that can be asked for, by name. `default` and `default_flux` are among them.

    `unserved`: what else lies in the folder of checkpoints, each with a sentence on why it is no model here.
    """

    models: Mapping[str, ModelInfo]
    default: str
    default_flux: str | None = None
    unserved: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes; all zero on a device without memory of its own (CPU)."""

    total: int = 0
    used: int = 0
    allocated: int = 0
    reserved: int = 0
    peak: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    """A worker and its device at this moment. `kind` is `cpu` or `cuda`; `pid` is that of the worker process.

    `plans` say where the networks of loaded models lie, by model; none for those that lie there as a whole anyway.
    `loading` is the model that is being loaded and the part of it, `up` says that the worker has come up and is not
    lost since, `reason` why the last one was lost: a sentence that names nothing of this machine.
    """

    device: str
    kind: str
    name: str
    state: WorkerState
    pid: int | None
    restarts: int
    memory: DeviceMemory
    loaded: tuple[str, ...]
    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loading: str | None = None
    up: bool = True
    reason: str | None = None

    @property
    def ready(self) -> bool:
        """It can take a job, now or when it has finished the one it has."""
        return self.up and self.state in (WorkerState.READY, WorkerState.BUSY, WorkerState.LOADING)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """`capacity`: jobs that may wait, 0 where nothing bounds them here.

    `quarantined`: models that no worker is given at present, `unavailable`: models that none could load when it was
    last tried, each with the reason, a sentence for everyone.
    """

    pending: int
    running: int
    devices: tuple[DeviceStatus, ...]
    capacity: int = 0
    draining: bool = False
    quarantined: Mapping[str, str] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Some worker can take a job, now or when it has finished the one it has."""
        return not self.draining and any(device.ready for device in self.devices)

    @property
    def loaded(self) -> frozenset[str]:
        return frozenset(name for device in self.devices for name in device.loaded)

    @property
    def plans(self) -> dict[str, Mapping[str, Any]]:
        """By model, of the first device that has it."""
        return {name: plan for device in reversed(self.devices) for name, plan in device.plans.items()}


def settle(future: asyncio.Future[Outcome], outcome: Outcome | ServiceError) -> None:
    """Nothing where whoever waited has cancelled it."""
    if future.done():
        return
    if isinstance(outcome, ServiceError):
        future.set_exception(outcome)
        future.exception()  # the client may have left: nobody reading it is no fault
    else:
        future.set_result(outcome)


_ages = itertools.count()


class JobHandle:
    """A job on its way. Belongs to one event loop.

    Times are of the monotonic clock, in seconds. `result` is settled exactly once, with a JobResult or a ServiceError;
    a second time raises IllegalTransition. `age` orders jobs by when they were accepted. `place` is that in the queue,
    1 for the next one, None for a job that doesn't wait. `on_change` is called when `state` or `place` has changed.
    Jobs of one `kind` can be drawn together; one without can not. Whoever listens is let go of when it is settled:
    listeners refer to the handle as a rule, and the circle would hold the job's pictures.
    """

    def __init__(self, job: AnyJob, on_step: StepListener | None = None, kind: Hashable | None = None) -> None:
        self.job = job
        self.on_step = on_step
        self.kind = kind
        self.on_change: Callable[[], None] | None = None
        self.age = next(_ages)
        self.state = JobState.QUEUED
        self.place: int | None = None
        self.attempts = 0
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.finished: float | None = None
        self.result: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<JobHandle {self.job.id} {self.state}>"

    @property
    def settled(self) -> bool:
        return self.finished is not None

    @property
    def queue_seconds(self) -> float:
        """Time waited before the (last) start; of a job that never started, until it was settled."""
        return (self.started or self.finished or time.monotonic()) - self.submitted

    @property
    def total_seconds(self) -> float:
        return (self.finished or time.monotonic()) - self.submitted

    def limit(self, expire: Callable[[JobHandle], None]) -> None:
        """Call `expire` at the job's deadline, if it has one and is not settled by then."""
        if self.job.deadline_seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.job.deadline_seconds, expire, self)

    def stand(self, place: int) -> None:
        if place != self.place:
            self.place = place
            self._tell()

    def run(self) -> None:
        self.state = moved(JOB_MOVES, self.state, JobState.RUNNING)
        self.place = None
        self.attempts += 1
        self.started = time.monotonic()
        self._tell()

    def requeue(self) -> None:
        self.state = moved(JOB_MOVES, self.state, JobState.QUEUED)
        self.started = None

    def succeed(self, result: JobResult) -> None:
        self._settle(JobState.DONE, result)

    def fail(self, error: ServiceError, state: JobState = JobState.FAILED) -> None:
        self._settle(state, error)

    def _settle(self, state: JobState, outcome: JobResult | ServiceError) -> None:
        self.state = moved(JOB_MOVES, self.state, state)
        self.place = None
        self.finished = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        self._tell()
        self.on_step = self.on_change = None
        settle(self.result, outcome)

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change()


class Engine(Protocol):
    """Runs jobs. Every call is made in one event loop; none of them blocks it."""

    async def start(self) -> None:
        """Return at once; readiness is seen in `status`."""

    async def drain(self, seconds: float) -> None:
        """Take no more jobs; return when every accepted one is settled, those not done after `seconds` with NotReady.

        A second call with 0 cuts the first one short, and lets `stop` end the workers at once.
        """

    async def stop(self) -> None:
        """Answer what is not done with NotReady, end every process."""

    def catalogue(self) -> Catalogue:
        """Raises NotReady until a first worker has told of it."""

    def admit(self, model: str | None, *, promised: bool = False) -> None:
        """Raises what `submit` would refuse a job for `model` with at this moment, None: one that needs none."""

    def submit(self, job: AnyJob, on_step: StepListener | None = None, *, promised: bool = False) -> JobHandle:
        """Queue a job. Raises QueueFull, NotReady or ModelUnavailable. `on_step` is called in the event loop after
        each step. `promised`: accepted by an earlier run of this server, so a full queue is no reason to refuse it.
        """

    def cancel(self, job_id: str) -> bool:
        """Give a job up: it is settled at once, and its worker is free at the next step.

        False: no such job is on its way. No other job is ever touched.
        """

    def status(self) -> EngineStatus: ...
