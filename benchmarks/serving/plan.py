"""From measured service times to latencies, and to a fleet: the workers that a rate takes, and what an image costs.

A machine's queue is simulated with SimPy under the engine's own rules: one queue, oldest first, bounded; what goes into
a batch, and whether a free worker waits for more, is asked of the engine itself. A request is for one image.

A fleet is machines of some workers each, every machine with a queue of its own. A balancer that knows nothing of queues
splits Poisson arrivals into Poisson arrivals, so one simulated machine speaks for all.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import simpy

from app.engine.queue import Grouping
from benchmarks.serving.load import spread

ARRIVALS = 20_000
HALVINGS = 12
REPLAYS = 20
NAMES = ("mean", "p50", "p95")

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


def mean(times: Times, kinds: Kinds, images: int = 1) -> float:
    """Of one image of a mix, drawn in batches of so many."""
    each = [
        weight * statistics.fmean(times[name]["busy"]) * times[name]["batches"][str(images)] for name, weight in kinds
    ]
    return sum(each) / images / sum(weight for _, weight in kinds)


_ONE_IMAGE = SimpleNamespace(images=1)


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
            busy = source.choice(times[name]["busy"]) * times[name]["batches"][str(size)]
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


def named(rules: Mapping[str, Any]) -> str:
    """A server's rules in words; of one that runs elsewhere, what its requests ask."""
    return rules.get("asked") or f"caches {'on' if rules['caches'] else 'off'}, batches of {rules['max_batch']}"


@dataclass(frozen=True, slots=True)
class Setting:
    """What a measured open loop says of a machine: its rules, the mix of kinds and their service times."""

    name: str
    machine: Machine
    kinds: Kinds
    times: Times

    @classmethod
    def of(cls, entry: Mapping[str, Any], workers: int = 1) -> Setting:
        machine = Machine(workers, entry["rules"]["max_batch"], entry["rules"]["queue"])
        return cls(named(entry["rules"]), machine, entry["mix"], entry["times"])

    def simulated(self, rate: float) -> tuple[list[Outcome], float]:
        """Those of `ARRIVALS` that were accepted, and the seconds in which they came: denser at a higher rate."""
        source = random.Random(0)
        arrivals = poisson_kinds(rate, ARRIVALS, self.kinds, source)
        return [one for one in simulate(self.machine, arrivals, self.times, source) if one], arrivals[-1][0]

    def within(self, rate: float, objective: float) -> float:
        """The share of requests that are answered in time; a refused one is not."""
        return sum(one.latency <= objective for one in self.simulated(rate)[0]) / ARRIVALS

    def replayed(self, arrivals: Sequence[tuple[float, str]], warm_up: float) -> dict[str, float]:
        """`NAMES` of the latencies that the simulation gives arrivals that were measured, in the mean of some runs."""
        source, runs = random.Random(0), []
        for _ in range(REPLAYS):
            outcomes = zip(arrivals, simulate(self.machine, arrivals, self.times, source), strict=True)
            runs.append(spread([one.latency for (at, _), one in outcomes if one and at >= warm_up]) or {})
        return {name: statistics.fmean(run[name] for run in runs) for name in NAMES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """rate: requests a second at the peak. At least `share` of them get their pictures within `objective` seconds.

    price: of one worker (its GPU and its part of the machine) for an hour, in any currency.
    """

    rate: float
    objective: float
    share: float
    price: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """`per_machine`: the highest rate at which a machine keeps the objective; busy: of its workers' time, at that rate.

    Nothing of it where an idle machine misses the objective. cost: of a thousand images.
    """

    name: str
    per_machine: float = 0.0
    busy: float = 0.0
    machines: int = 0
    workers: int = 0
    cost: float = 0.0


def fleet(one: Setting, demand: Demand) -> Fleet:
    if not (rate := highest_rate(one, demand)):
        return Fleet(one.name)
    found, seconds = one.simulated(rate)
    busy = sum(outcome.occupied for outcome in found) / (one.machine.workers * seconds)
    machines = math.ceil(demand.rate / rate)
    workers = machines * one.machine.workers
    return Fleet(one.name, rate, busy, machines, workers, 1000 * workers * demand.price / (3600 * demand.rate))


def highest_rate(one: Setting, demand: Demand) -> float:
    """Requests a second at which one machine still keeps the objective; 0 if an idle one does not."""
    low, high = 0.0, one.machine.workers * one.machine.max_batch / mean(one.times, one.kinds)
    if one.within(high / 1000, demand.objective) < demand.share:
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if one.within(middle, demand.objective) >= demand.share else (low, middle)
    return low
