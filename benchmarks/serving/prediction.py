"""What the plan's models say of a run that was measured, beside what was measured."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.figures import Spread
from benchmarks.serving.queueing import pollaczek_khinchine
from benchmarks.serving.service import ServiceTimes
from benchmarks.serving.simulation import Arrival, Machine, Outcome, simulate

REPLICAS = 200  # simulated runs as long as the measured one
REPLAYS = 20
NAMES = ("mean", "p50", "p95")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Latencies in seconds, each of `NAMES`, at the load that there was: `load`, a share of one worker's time.

    model: of all simulated runs together, with as many arrivals as there were; low, high: between which 95 % of single
    runs lie, by the luck of when they come. replay: of the very arrivals. closed_form: the mean, where there is one:
    one worker without batches.
    """

    load: float
    measured: dict[str, float]
    model: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    replay: dict[str, float]
    closed_form: float | None

    def error(self, name: str) -> float:
        return self.model[name] / self.measured[name] - 1

    def replay_error(self, name: str) -> float:
        return self.replay[name] / self.measured[name] - 1


def predict(entry: Mapping[str, Any], seed: int = 0) -> Prediction:
    """`entry`: a measured open loop with its service times, as `scenarios.Measured.as_dict` writes it."""
    times = ServiceTimes.from_dict(entry["times"])
    rules = entry["rules"]
    machine = Machine(max_batch=rules["max_batch"], queue_size=rules["queue"])
    kinds = [(name, weight) for name, weight in entry["mix"]]
    source = random.Random(seed)
    real = [(scheduled, kind) for scheduled, _, _, kind, *_ in entry["points"]]
    rate = len(real) / entry["seconds"]

    def latencies(arrivals: Sequence[Arrival]) -> list[float]:
        return [
            one.latency
            for (at, _), one in zip(arrivals, simulate(machine, arrivals, times, source), strict=True)
            if isinstance(one, Outcome) and at >= entry["warm_up"]
        ]

    runs = [latencies(_at_random(len(real), entry["seconds"], kinds, source)) for _ in range(REPLICAS)]
    spreads = [Spread.of(found) for found in runs]
    pooled = Spread.of([latency for found in runs for latency in found])
    replays = [Spread.of(latencies(real)) for _ in range(REPLAYS)]
    single = times.sample(kinds, 20_000, source)
    rest = sum(times.rest(kind) * weight for kind, weight in kinds) / sum(weight for _, weight in kinds)
    wait = pollaczek_khinchine(rate, single) if rules["max_batch"] == 1 else None
    return Prediction(
        load=rate / entry["capacity"],
        measured={name: entry["figures"]["latency"][name] for name in NAMES},
        model={name: getattr(pooled, name) for name in NAMES},
        low={name: _quantile([getattr(one, name) for one in spreads], 0.025) for name in NAMES},
        high={name: _quantile([getattr(one, name) for one in spreads], 0.975) for name in NAMES},
        replay={name: statistics.fmean(getattr(one, name) for one in replays) for name in NAMES},
        closed_form=None if wait is None else wait + statistics.fmean(single) + rest,
    )


def _at_random(count: int, seconds: float, kinds: Sequence[tuple[str, float]], source: random.Random) -> list[Arrival]:
    """A Poisson process of which the number of arrivals is known: each comes at any time, as likely as at another."""
    drawn = source.choices([name for name, _ in kinds], [weight for _, weight in kinds], k=count)
    return list(zip(sorted(source.uniform(0, seconds) for _ in range(count)), drawn, strict=True))


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
