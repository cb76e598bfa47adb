"""A machine's queue and workers, simulated event by event, under the rules of the service's own engine.

One queue, oldest first. A free worker takes the oldest request and, with batching, the next oldest ones of its kind up
to the batch's size; nobody is waited for. A request that finds the queue full is refused.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.serving.service import ServiceTimes


@dataclass(frozen=True, slots=True)
class Machine:
    workers: int = 1
    max_batch: int = 1
    queue_size: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds. `batch`: with how many, itself included, it was denoised."""

    wait: float
    latency: float
    batch: int


Arrival = tuple[float, str]
"""When, in seconds, and the kind."""


def simulate(
    machine: Machine, arrivals: Iterable[Arrival], times: ServiceTimes, source: random.Random
) -> list[Outcome | None]:
    """In the order of `arrivals`, which must be that of time; None: refused."""
    outcomes: list[Outcome | None] = []
    waiting: list[tuple[int, float, str]] = []  # number, arrival, kind; oldest first
    free = [0.0] * machine.workers  # when each worker is done with what it has; a heap

    def begin(at: float) -> None:
        kind = waiting[0][2]
        batch = [one for one in waiting if one[2] == kind][: machine.max_batch]
        for one in batch:
            waiting.remove(one)
        busy = times.busy(kind, len(batch), source)
        heapq.heapreplace(free, at + busy)
        for number, arrived, _ in batch:
            outcomes[number] = Outcome(at - arrived, at - arrived + busy + times.rest(kind), len(batch))

    for number, (arrived, kind) in enumerate(arrivals):
        while waiting and free[0] <= arrived:
            begin(free[0])
        outcomes.append(None)
        if free[0] <= arrived:
            waiting.append((number, arrived, kind))
            begin(arrived)
        elif len(waiting) < machine.queue_size:
            waiting.append((number, arrived, kind))
    while waiting:
        begin(free[0])
    return outcomes


def poisson_kinds(rate: float, count: int, kinds: Sequence[tuple[str, float]], source: random.Random) -> list[Arrival]:
    """`count` arrivals of a Poisson process, each of a kind drawn by the kinds' weights."""
    names, weights = [name for name, _ in kinds], [weight for _, weight in kinds]
    at = 0.0
    arrivals = []
    for kind in source.choices(names, weights, k=count):
        at += source.expovariate(rate)
        arrivals.append((at, kind))
    return arrivals
