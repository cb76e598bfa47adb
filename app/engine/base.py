"""What an engine is: jobs go in, results come out; which process runs them is its own affair.

Nothing here imports torch: these types cross between the HTTP process and the workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from app.errors import ServiceError
from cache import CacheStrategy
from models.base import CacheName, GenerationParams, Step, Timings

OutputFormat = Literal["png", "jpeg", "webp"]
CacheSummary = Mapping[str, object]  # JSON values only
StepListener = Callable[[Step], None]


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class WorkerState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One validated request. `warnings` are sentences that validation has for the user already."""

    id: str
    model: str
    params: GenerationParams
    strategy: CacheStrategy
    output_format: OutputFormat = "png"
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """Encoded pictures, one a seed, and what is to be said about them. `cache` is the contract's report."""

    images: tuple[bytes, ...]
    cache: CacheSummary
    timings: Timings
    batches: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A place where DeepCache can cut the model; `reuse_cost` is a reuse step's share of a full one."""

    branch: int
    reuse_cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a request has to know of a model to be checked against it.

    Sizes are in pixels, (width, height); `render_sizes` are those it draws at before resampling, if it is so bound.
    `error` says why its files do not load, if they do not.
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
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """The models that can be asked for, by name. `default` and `default_flux` are among them."""

    models: Mapping[str, ModelInfo]
    default: str
    default_flux: str | None = None


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
    """A worker and its device at this moment. `kind` is `cpu` or `cuda`; `pid` is that of the worker process."""

    device: str
    kind: str
    name: str
    state: WorkerState
    pid: int | None
    restarts: int
    memory: DeviceMemory
    loaded: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    pending: int
    running: int
    devices: tuple[DeviceStatus, ...]

    @property
    def ready(self) -> bool:
        """Some worker can take a job, now or when it has finished the one it has."""
        return any(device.state in (WorkerState.READY, WorkerState.BUSY) for device in self.devices)

    @property
    def loaded(self) -> frozenset[str]:
        return frozenset(name for device in self.devices for name in device.loaded)


class JobHandle:
    """A job on its way. Belongs to one event loop.

    Times are of the monotonic clock, in seconds. `result` is settled exactly once, with a JobResult or a ServiceError.
    """

    def __init__(self, job: Job, on_step: StepListener | None = None) -> None:
        self.job = job
        self.on_step = on_step
        self.state = JobState.QUEUED
        self.attempts = 0
        self.cancel_requested = False
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.finished: float | None = None
        self.result: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<JobHandle {self.job.id} {self.state}>"

    @property
    def queue_seconds(self) -> float:
        """Time waited before the (last) start; of a job that never started, until it was settled."""
        return (self.started or self.finished or time.monotonic()) - self.submitted

    @property
    def total_seconds(self) -> float:
        return (self.finished or time.monotonic()) - self.submitted

    def run(self) -> None:
        self.state = JobState.RUNNING
        self.attempts += 1
        self.started = time.monotonic()

    def requeue(self) -> None:
        self.state = JobState.QUEUED
        self.started = None

    def succeed(self, result: JobResult) -> None:
        self._settle(JobState.DONE)
        if not self.result.done():
            self.result.set_result(result)

    def fail(self, error: ServiceError, state: JobState = JobState.FAILED) -> None:
        self._settle(state)
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # the client may have left: nobody reading it is no fault

    def _settle(self, state: JobState) -> None:
        self.state = state
        self.finished = time.monotonic()


class Engine(Protocol):
    """Runs jobs. Every call is made in one event loop; none of them blocks it."""

    async def start(self) -> None:
        """Return at once; readiness is seen in `status`."""
        ...

    async def stop(self) -> None:
        """Cancel what runs, answer what waits with NotReady, end every process."""
        ...

    def catalogue(self) -> Catalogue:
        """Raises NotReady until a first worker has come up."""
        ...

    def submit(self, job: Job, on_step: StepListener | None = None) -> JobHandle:
        """Queue a job. Raises QueueFull or NotReady. `on_step` is called in the event loop after each step."""
        ...

    def cancel(self, job_id: str) -> bool:
        """Stop a job, at once if it waits, at its next step if it runs. False: no such job is on its way."""
        ...

    def status(self) -> EngineStatus: ...
