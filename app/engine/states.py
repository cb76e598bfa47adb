"""The states of a worker and of a job, and the moves between them that can happen; any other is a bug and raises."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar


class WorkerState(StrEnum):
    """`failed`: the process is gone, and another one is started after a pause.

    `draining`: what was accepted is finished, nothing else is.
    """

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
    _J.DONE: frozenset(),
    _J.FAILED: frozenset(),
    _J.CANCELLED: frozenset(),
}

State = TypeVar("State", WorkerState, JobState)


def moved(moves: Mapping[State, frozenset[State]], old: State, new: State) -> State:
    """`new`, if it may follow `old`. Raises IllegalTransition."""
    if new not in moves[old]:
        raise IllegalTransition(f"{type(old).__name__}: {new.value} cannot follow {old.value}")
    return new
