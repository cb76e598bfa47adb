"""What a worker process and its supervisor say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from app.engine.base import Catalogue, DeviceMemory, Job, JobResult
from models.base import Step

FailureKind = Literal[
    "cancelled", "unknown_model", "load_failed", "model_error", "incompatible", "out_of_memory", "failed"
]


@dataclass(frozen=True, slots=True)
class Run:
    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop this job at its next step; no other job is ever meant, however late this arrives."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End after the job that runs."""


Order = Run | Cancel | Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """The state of a worker's device between two jobs."""

    kind: str
    name: str
    memory: DeviceMemory
    loaded: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """The default model is loaded: a job can run."""

    catalogue: Catalogue
    condition: Condition


@dataclass(frozen=True, slots=True)
class StartFailed:
    message: str
    detail: str


@dataclass(frozen=True, slots=True)
class Progress:
    job_id: str
    step: Step


@dataclass(frozen=True, slots=True)
class Done:
    job_id: str
    result: JobResult
    condition: Condition


@dataclass(frozen=True, slots=True)
class Failed:
    """`message` is for the client, `detail` (a stack trace) for the log."""

    job_id: str
    kind: FailureKind
    message: str
    detail: str
    condition: Condition


Report = Ready | StartFailed | Progress | Done | Failed
