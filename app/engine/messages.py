"""What a worker process and its supervisor say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from app.engine.base import Catalogue, DeviceMemory, Job, JobResult
from models.base import Step

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
