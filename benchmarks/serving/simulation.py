"""A machine's queue and workers, simulated event by event, under the rules of the service's own engine.

One queue, oldest first, bounded; what goes into a batch, and whether a free worker waits for more, is asked of
`app.engine.queue` itself. A request is for one image.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from app.engine.queue import Grouping
from benchmarks.serving.service import ServiceTimes


@dataclass(frozen=True, slots=True)
class Machine:
    """`batch_timeout`: seconds, LD_BATCH_TIMEOUT."""

    workers: int = 1
    max_batch: int = 1
    queue_size: int = 64
    batch_timeout: float = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds. `batch`: with how many, itself included, it was denoised; `occupied`: its part of that batch's time."""

    wait: float
    latency: float
    batch: int
    occupied: float


Arrival = tuple[float, str]
"""When, in seconds, and the kind."""


_ONE_IMAGE = SimpleNamespace(params=SimpleNamespace(seeds=(0,)))


@dataclass(eq=False, slots=True)
class _Waiting:
    """What of a JobHandle decides on its group."""

    number: int
    at: float
    name: str
    kind: str | None  # None: groups with none
    attempts: int = 0
    job: SimpleNamespace = field(default_factory=lambda: _ONE_IMAGE)


def simulate(
    machine: Machine, arrivals: Iterable[Arrival], times: ServiceTimes, source: random.Random
) -> list[Outcome | None]:
    """In the order of `arrivals`, which must be that of time; None: refused."""
    return _Simulation(machine, times, source).run(arrivals)


class _Simulation:
    def __init__(self, machine: Machine, times: ServiceTimes, source: random.Random) -> None:
        self.machine, self.times, self.source = machine, times, source
        self.now = 0.0
        self.grouping = Grouping(machine.max_batch, machine.batch_timeout, lambda: self.now)
        self.waiting: list[_Waiting] = []  # by age
        self.ends: list[tuple[float, int, list[_Waiting]]] = []  # of the groups in the workers; a heap
        self.groups = itertools.count()
        self.later = math.inf  # when to look again at a group that waits for company
        self.outcomes: list[Outcome | None] = []

    def run(self, arrivals: Iterable[Arrival]) -> list[Outcome | None]:
        coming = iter(arrivals)
        following = next(coming, None)
        while following is not None or self.waiting or self.ends:
            arrives = following[0] if following is not None else math.inf
            ends = self.ends[0][0] if self.ends else math.inf
            self.now = min(arrives, ends, self.later)
            if ends <= self.now:
                for one in heapq.heappop(self.ends)[2]:
                    self.grouping.ended(one)  # type: ignore[arg-type]
            elif following is not None and arrives <= self.now:
                self._arrive(*following)
                following = next(coming, None)
            self._dispatch()
        return self.outcomes

    def _arrive(self, at: float, name: str) -> None:
        self.outcomes.append(None)
        if len(self.waiting) >= self.machine.queue_size:
            return
        one = _Waiting(len(self.outcomes) - 1, at, name, name if self.machine.max_batch > 1 else None)
        self.waiting.append(one)
        self.grouping.arrived(one, self.waiting, self._running())  # type: ignore[arg-type]

    def _dispatch(self) -> None:
        """As `app.engine.supervisor` does."""
        self.later = math.inf
        free = self.machine.workers - len(self.ends)
        while free and self.waiting:
            free -= 1
            group, seconds = self.grouping.choose(self.waiting, self._running(), idle=free)  # type: ignore[arg-type]
            if not group:
                self.later = self.now + seconds
                return
            self._begin(group)  # type: ignore[arg-type]

    def _begin(self, group: Sequence[_Waiting]) -> None:
        busy = self.times.busy(group[0].name, len(group), self.source)
        for one in group:
            self.waiting.remove(one)
            wait = self.now - one.at
            self.outcomes[one.number] = Outcome(
                wait, wait + busy + self.times.rest(one.name), len(group), busy / len(group)
            )
        heapq.heappush(self.ends, (self.now + busy, next(self.groups), list(group)))

    def _running(self) -> list[_Waiting]:
        return [one for _, _, group in self.ends for one in group]


def poisson_kinds(rate: float, count: int, kinds: Sequence[tuple[str, float]], source: random.Random) -> list[Arrival]:
    """`count` arrivals of a Poisson process, each of a kind drawn by the kinds' weights."""
    names, weights = [name for name, _ in kinds], [weight for _, weight in kinds]
    at = 0.0
    arrivals = []
    for kind in source.choices(names, weights, k=count):
        at += source.expovariate(rate)
        arrivals.append((at, kind))
    return arrivals
