"""How long a worker is occupied, a machine's queue simulated with SimPy under the engine's own rules, and closed forms.

One queue, oldest first, bounded; what goes into a batch, and whether a free worker waits for more, is asked of the
engine itself. A request is for one image.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import simpy

from app.engine.queue import Grouping

Kinds = Sequence[tuple[str, float]]
"""Names with their shares of all requests, relative to each other."""
Times = dict[str, dict[str, Any]]
"""By kind, seconds. `alone`: latencies in an idle server; `busy`: from one end to the next, while that request waited.

They differ by what does not occupy the worker: reading and writing HTTP, and work that the server does for one request
while it denoises another. `batches`: the time of so many images denoised together, over that of one.
"""


def rest(one: Mapping[str, Any]) -> float:
    """What a request of a kind takes besides the time that it occupies the worker."""
    return statistics.median(one["alone"]) - statistics.median(one["busy"])


def factor(one: Mapping[str, Any], images: int) -> float:
    """Between two measured sizes on the line between them. Raises ValueError past the largest measured batch."""
    sizes = sorted((int(size), float(value)) for size, value in one["batches"].items())
    if images > sizes[-1][0]:
        raise ValueError(f"batches of {images} were not measured, only of {[size for size, _ in sizes]}")
    return float(np.interp(images, *zip(*sizes, strict=True)))


def sample(times: Times, kinds: Kinds, count: int, source: random.Random) -> list[float]:
    """Times of a mix's single requests, for the closed forms."""
    names = source.choices([name for name, _ in kinds], [weight for _, weight in kinds], k=count)
    return [source.choice(times[name]["busy"]) for name in names]


def mean(times: Times, kinds: Kinds, images: int = 1) -> float:
    """Of one image of a mix, drawn in batches of so many."""
    each = [weight * statistics.fmean(times[name]["busy"]) * factor(times[name], images) for name, weight in kinds]
    return sum(each) / images / sum(weight for _, weight in kinds)


_ONE_IMAGE = SimpleNamespace(params=SimpleNamespace(seeds=(0,)))


@dataclass(frozen=True, slots=True)
class Machine:
    """`batch_timeout`: seconds, LD_BATCH_TIMEOUT."""

    workers: int = 1
    max_batch: int = 1
    queue_size: int = 64
    batch_timeout: float = 0.5


class Outcome(NamedTuple):
    """Seconds. `batch`: with how many, itself included, it was denoised; `occupied`: its part of that batch's time."""

    wait: float
    latency: float
    batch: int
    occupied: float


@dataclass(eq=False, slots=True)
class _Waiting:
    """What of a job decides on its group. `kind`: None groups with none."""

    number: int
    at: float
    name: str
    kind: str | None
    attempts: int = 0
    job: Any = field(default_factory=lambda: _ONE_IMAGE)


def simulate(
    machine: Machine, arrivals: Iterable[tuple[float, str]], times: Times, source: random.Random
) -> list[Outcome | None]:
    """In the order of `arrivals`, seconds and kinds, which must be that of time; None: refused."""
    world = simpy.Environment()
    grouping: Any = Grouping(machine.max_batch, machine.batch_timeout, lambda: world.now)
    besides = {name: rest(one) for name, one in times.items()}
    longer = cache(lambda name, size: factor(times[name], size))
    waiting: list[_Waiting] = []  # by age
    groups: list[list[_Waiting]] = []  # in the workers
    outcomes: list[Outcome | None] = []
    later = math.inf  # when to look again at a group that waits for company

    def running() -> list[_Waiting]:
        return [one for group in groups for one in group]

    def dispatch() -> None:
        nonlocal later
        later, free = math.inf, machine.workers - len(groups)
        while free and waiting:
            free -= 1
            group, seconds = grouping.choose(waiting, running(), idle=free)
            if not group:
                later = world.now + seconds
                world.process(look_again(seconds))
                return
            name, size = group[0].name, len(group)
            busy = source.choice(times[name]["busy"]) * longer(name, size)
            for one in group:
                waiting.remove(one)
                wait = world.now - one.at
                outcomes[one.number] = Outcome(wait, wait + busy + besides[name], size, busy / size)
            groups.append(group)
            world.process(draw(group, busy))

    def look_again(seconds: float) -> Iterator[simpy.Event]:
        yield world.timeout(seconds)
        if world.now >= later:
            dispatch()

    def draw(group: list[_Waiting], busy: float) -> Iterator[simpy.Event]:
        yield world.timeout(busy)
        groups.remove(group)
        for one in group:
            grouping.ended(one)
        dispatch()

    def arrive() -> Iterator[simpy.Event]:
        for at, name in arrivals:
            yield world.timeout(max(0.0, at - world.now))
            outcomes.append(None)
            if len(waiting) < machine.queue_size:
                waiting.append(_Waiting(len(outcomes) - 1, at, name, name if machine.max_batch > 1 else None))
                grouping.arrived(waiting[-1], waiting, running())
            dispatch()

    world.process(arrive())
    world.run()
    return outcomes


def poisson_kinds(rate: float, count: int, kinds: Kinds, source: random.Random) -> list[tuple[float, str]]:
    """`count` arrivals of a Poisson process, each of a kind drawn by the kinds' weights."""
    at, arrivals = 0.0, []
    for kind in source.choices([name for name, _ in kinds], [weight for _, weight in kinds], k=count):
        at += source.expovariate(rate)
        arrivals.append((at, kind))
    return arrivals


# Closed forms, of Poisson arrivals, know no batches and no bounded queue; the simulation is held against them where
# both apply. Seconds, and requests a second; `service`: equally likely service times.


def pollaczek_khinchine(rate: float, service: Sequence[float]) -> float:
    """Mean wait before one worker, exact (M/G/1; Kleinrock, Queueing Systems I, 5.6): λ E[S²] / (2 (1 − ρ))."""
    times = np.asarray(service)
    load = rate * times.mean()
    return float(rate * (times**2).mean() / (2 * (1 - load))) if load < 1 else math.inf


def erlang_c(workers: int, load: float) -> float:
    """Probability that an arrival has to wait (M/M/k); `load` is λ E[S], the workers that are busy on average."""
    if load >= workers:
        return 1.0
    blocked = 1.0  # Erlang B by its recursion: factorials of large fleets overflow
    for worker in range(1, workers + 1):
        blocked = load * blocked / (worker + load * blocked)
    return blocked / (1 - load / workers * (1 - blocked))


def allen_cunneen(rate: float, service: Sequence[float], workers: int) -> float:
    """Mean wait before `workers` with one queue (M/G/k), approximately: that of M/M/k times (1 + c²) / 2.

    Allen, Probability, Statistics and Queueing Theory, 2nd ed., 5.3. Exact for one worker.
    """
    times = np.asarray(service)
    mean = float(times.mean())
    if (load := rate * mean) >= workers:
        return math.inf
    return erlang_c(workers, load) * mean / (workers - load) * (1 + float(times.var()) / mean**2) / 2
