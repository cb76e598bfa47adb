"""From measured service times to latencies, and to a fleet: the workers that a rate takes, and what an image costs.

A fleet is machines of some workers each, every machine with a queue of its own. A balancer that knows nothing of queues
splits Poisson arrivals into Poisson arrivals, so one simulated machine speaks for all.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.load import spread
from benchmarks.serving.simulation import (
    Kinds,
    Machine,
    Outcome,
    Times,
    allen_cunneen,
    mean,
    poisson_kinds,
    pollaczek_khinchine,
    rest,
    sample,
    simulate,
)

ARRIVALS = 20_000
HALVINGS = 12
REPLICAS = 200  # simulated runs as long as the measured one
REPLAYS = 20
NAMES = ("mean", "p50", "p95")


def setting(entry: Mapping[str, Any]) -> str:
    """An entry's name among those of its load; of a load by hand, whose rules nobody knows, what its requests ask."""
    rules = entry["rules"]
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
        return cls(setting(entry), machine, [(name, share) for name, share in entry["mix"]], entry["times"])

    def simulated(self, rate: float) -> tuple[list[Outcome], float]:
        """Those of `ARRIVALS` that were accepted, and the seconds in which they came: denser at a higher rate."""
        source = random.Random(0)
        arrivals = poisson_kinds(rate, ARRIVALS, self.kinds, source)
        return [one for one in simulate(self.machine, arrivals, self.times, source) if one], arrivals[-1][0]

    def within(self, rate: float, objective: float) -> float:
        """The share of requests that are answered in time; a refused one is not."""
        return sum(one.latency <= objective for one in self.simulated(rate)[0]) / ARRIVALS


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
    per_machine: float = 0.0
    busy: float = 0.0
    machines: int | None = None
    workers: int | None = None
    cost: float | None = None
    pooled: int | None = None


def fleet(one: Setting, demand: Demand) -> Fleet:
    machine, rate = one.machine, highest_rate(one, demand)
    if not rate:
        return Fleet(one.name)
    found, seconds = one.simulated(rate)
    busy = sum(outcome.occupied for outcome in found) / (machine.workers * seconds)
    machines = math.ceil(demand.rate / rate)
    workers = machines * machine.workers
    single = sample(one.times, one.kinds, ARRIVALS, random.Random(0))
    wait = allen_cunneen(rate, single, machine.workers)
    pooled = None if machine.max_batch > 1 else pooled_workers(demand.rate, single, wait)
    return Fleet(one.name, rate, busy, machines, workers, 1000 * workers * demand.price / (3600 * demand.rate), pooled)


def highest_rate(one: Setting, demand: Demand) -> float:
    """Requests a second at which one machine still keeps the objective; 0 if an idle one does not."""
    low, high = 0.0, one.machine.workers * one.machine.max_batch / mean(one.times, one.kinds)
    if one.within(high / 1000, demand.objective) < demand.share:
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if one.within(middle, demand.objective) >= demand.share else (low, middle)
    return low


def pooled_workers(rate: float, service: Sequence[float], wait: float) -> int:
    """The fewest workers with one queue whose mean wait is at most `wait` seconds."""
    workers = max(1, math.ceil(rate * sum(service) / len(service)))
    while allen_cunneen(rate, service, workers) > wait:
        workers += max(1, workers // 1000)
    return workers


@dataclass(frozen=True, slots=True)
class Prediction:
    """One of `NAMES` of a measured load's latencies, seconds.

    model: of all simulated runs together, with as many arrivals as there were; low, high: between which 95 % of single
    runs lie, by the luck of when they come. replay: of the very arrivals. exact: the mean in closed form, where there
    is one: one worker without batches.
    """

    measured: float
    model: float
    low: float
    high: float
    replay: float
    exact: float | None = None

    @property
    def error(self) -> float:
        return self.model / self.measured - 1

    @property
    def replay_error(self) -> float:
        return self.replay / self.measured - 1


def predict(entry: Mapping[str, Any]) -> dict[str, Prediction]:
    """What the model says of `entry`, an open loop that was measured, with its service times."""
    one, source = Setting.of(entry), random.Random(0)
    real = [(scheduled, kind) for scheduled, _, _, kind, *_ in entry["points"]]
    rate = len(real) / entry["seconds"]

    def latencies(arrivals: Sequence[tuple[float, str]]) -> list[float]:
        outcomes = zip(arrivals, simulate(one.machine, arrivals, one.times, source), strict=True)
        return [found.latency for (at, _), found in outcomes if found and at >= entry["warm_up"]]

    def at_random() -> list[tuple[float, str]]:
        """Of a Poisson process whose number of arrivals is known each comes at any time, as likely as at another."""
        kinds = source.choices([name for name, _ in one.kinds], [weight for _, weight in one.kinds], k=len(real))
        return list(zip(sorted(source.uniform(0, entry["seconds"]) for _ in real), kinds, strict=True))

    runs = [latencies(at_random()) for _ in range(REPLICAS)]
    spreads: Any = [spread(found) for found in runs]
    pooled: Any = spread([latency for found in runs for latency in found])
    replays: Any = [spread(latencies(real)) for _ in range(REPLAYS)]
    single = sample(one.times, one.kinds, ARRIVALS, source)
    besides = sum(rest(one.times[kind]) * weight for kind, weight in one.kinds) / sum(share for _, share in one.kinds)
    wait = pollaczek_khinchine(rate, single) if one.machine.max_batch == 1 else None

    def of(name: str) -> Prediction:
        singles = sorted(float(found[name]) for found in spreads)
        low, high = (singles[int(share * REPLICAS)] for share in (0.025, 0.975))
        replay = statistics.fmean(found[name] for found in replays)
        exact = None if wait is None or name != "mean" else wait + statistics.fmean(single) + besides
        return Prediction(entry["figures"]["latency"][name], pooled[name], low, high, replay, exact)

    return {name: of(name) for name in NAMES}
