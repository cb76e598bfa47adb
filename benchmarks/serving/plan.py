"""From measured service times to a fleet: the workers that a rate and an objective take, and what an image costs.

A fleet is machines of some workers each, every machine with a queue of its own (`app.engine.supervisor`). A balancer that
knows nothing of queues splits Poisson arrivals into Poisson arrivals, so one simulated machine speaks for all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.figures import percentile
from benchmarks.serving.kept import setting
from benchmarks.serving.queueing import allen_cunneen
from benchmarks.serving.service import ServiceTimes
from benchmarks.serving.simulation import Machine, poisson_kinds, simulate

ARRIVALS = 20_000
HALVINGS = 12

Kinds = Sequence[tuple[str, float]]


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
    """`per_machine`: the highest rate at which a machine keeps the objective, 0: none does.

    busy: of its workers' time, at that rate. pooled: workers that one queue over the whole fleet would need for the
    same mean wait, by Allen and Cunneen: no balancer does better. None with batches, which that formula does not know.
    """

    name: str
    machine: Machine
    per_machine: float
    busy: float
    machines: int | None
    cost: float | None
    pooled: int | None

    @property
    def workers(self) -> int | None:
        return None if self.machines is None else self.machines * self.machine.workers


@dataclass(frozen=True, slots=True)
class Operated:
    """A machine at a rate. within: the share of requests that keep the objective; busy: that of its workers' time."""

    within: float
    busy: float


def operated(
    machine: Machine, rate: float, kinds: Kinds, times: ServiceTimes, objective: float, seed: int = 0
) -> Operated:
    """A refused request is not in time. Arrivals are the same at each rate, only denser."""
    source = random.Random(seed)
    arrivals = poisson_kinds(rate, ARRIVALS, kinds, source)
    found = [one for one in simulate(machine, arrivals, times, source) if one is not None]
    good = sum(one.latency <= objective for one in found)
    seconds = arrivals[-1][0]
    return Operated(good / ARRIVALS, sum(one.occupied for one in found) / (machine.workers * seconds))


def highest_rate(machine: Machine, kinds: Kinds, times: ServiceTimes, demand: Demand, seed: int = 0) -> float:
    """Requests a second at which one machine still keeps the objective; 0 if an idle one does not."""
    low, high = 0.0, machine.workers * machine.max_batch / times.mean(kinds)

    def keeps(rate: float) -> bool:
        return operated(machine, rate, kinds, times, demand.objective, seed).within >= demand.share

    if not keeps(high / 1000):
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def fleet(name: str, machine: Machine, kinds: Kinds, times: ServiceTimes, demand: Demand, seed: int = 0) -> Fleet:
    rate = highest_rate(machine, kinds, times, demand, seed)
    if not rate:
        return Fleet(name, machine, 0.0, 0.0, None, None, None)
    busy = operated(machine, rate, kinds, times, demand.objective, seed).busy
    machines = math.ceil(demand.rate / rate)
    cost = 1000 * machines * machine.workers * demand.price / (3600 * demand.rate)
    source = random.Random(seed)
    single = times.sample(kinds, ARRIVALS, source)
    wait = allen_cunneen(rate, single, machine.workers)
    pooled = None if machine.max_batch > 1 else pooled_workers(demand.rate, single, wait)
    return Fleet(name, machine, rate, busy, machines, cost, pooled)


def pooled_workers(rate: float, service: Sequence[float], wait: float) -> int:
    """The fewest workers with one queue whose mean wait is at most `wait` seconds."""
    workers = max(1, math.ceil(rate * sum(service) / len(service)))
    while allen_cunneen(rate, service, workers) > wait:
        workers += max(1, workers // 1000)
    return workers


def curve(
    machine: Machine, kinds: Kinds, times: ServiceTimes, rates: Sequence[float], share: float, seed: int = 0
) -> list[float]:
    """The latency that `share` of the accepted requests do not exceed, at each rate."""
    found = []
    for rate in rates:
        source = random.Random(seed)
        outcomes = simulate(machine, poisson_kinds(rate, ARRIVALS, kinds, source), times, source)
        found.append(percentile([one.latency for one in outcomes if one is not None], share))
    return found


def settings(entries: Sequence[Mapping[str, Any]], workers: int) -> list[tuple[str, Machine, Kinds, ServiceTimes]]:
    """A name, the machine, its mix and its service times for each measured open loop."""
    found = []
    for entry in entries:
        rules = entry["rules"]
        machine = Machine(workers, rules["max_batch"], rules["queue"])
        kinds = [(kind, weight) for kind, weight in entry["mix"]]
        found.append((setting(entry), machine, kinds, ServiceTimes.from_dict(entry["times"])))
    return found
