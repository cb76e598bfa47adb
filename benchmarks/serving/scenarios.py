"""What is measured: throughput of busy clients, latency under random arrivals, and three times too much."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.server import SERVE, running
from benchmarks.serving.load import Load, Target, entry
from benchmarks.serving.requests import MIXED, SQUARE, Kind, with_fields
from benchmarks.serving.service import mean, measure, measure_batches, weights

CLIENTS = 8
ROUNDS = 3
LOAD = 0.7  # of the capacity
OVERLOAD = 3.0  # times the capacity
BATCH = 4
QUEUE = CLIENTS  # places of the overloaded server


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """`serve`: arguments of `python` that start the server. `threads`: that its worker computes with.

    `seconds`: of an open loop; the others need fewer and take a share of it. A twentieth is an open loop's warm-up.
    """

    serve: Sequence[str] = SERVE
    mixed: Sequence[Kind] = MIXED
    fields: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    seconds: float = 100.0
    objective: float = 2.0
    seed: int = 0

    def load(self, name: str, mix: Sequence[Kind], share: float, **loop: Any) -> Load:
        """`share`: of `seconds`. `loop`: rate or clients."""
        warm_up = 0.0 if "clients" in loop else self.seconds / 20
        given = {"seconds": share * self.seconds, "warm_up": warm_up, "objective": self.objective, "seed": self.seed}
        return Load(name=name, mix=mix, **given, **loop)

    @contextmanager
    def serving(self, max_batch: int, queue_size: int = 64, **others: str) -> Iterator[Target]:
        """`others`: further environment variables."""
        settings = {
            "WAVESPEED_DEVICE": "cpu",
            "WAVESPEED_THREADS": str(self.threads),
            "LD_MAX_BATCH_SIZE": str(max_batch),
            "WAVESPEED_QUEUE_SIZE": str(queue_size),
        }
        with running(self.serve, **(settings | others)) as server:
            yield Target(server.url, server.process.pid)

    def capacity(self, target: Target, mix: Sequence[Kind]) -> float:
        """Images a second that busy clients get."""
        load = self.load("busy", mix, 1 / 7, clients=CLIENTS)
        finished: float = entry(load, [target.run(load)])["figures"]["finished"]
        return finished


def measured(load: Load, rounds: Sequence[Any], caches: bool, max_batch: int, queue: int = 64, **found: Any) -> Any:
    """`max_batch`: 0 of a server that is not ours. `found`: service times, their drift, the capacity in images/s."""
    rules = {"caches": caches, "max_batch": max_batch, "queue": queue}
    unknown = {"times": None, "drift": None, "capacity": None}
    return {"rules": rules, "mix": weights(load.mix), **entry(load, rounds), **unknown, **found}


def closed(setup: Setup) -> list[dict[str, Any]]:
    """Eight clients that ask again at once, with and without caches and batches.

    In rounds over all settings, since a machine that is slow for a while should be so for all of them.
    """
    rounds: dict[Any, list[Any]] = {}
    with setup.serving(1) as single, setup.serving(BATCH) as batching:
        targets = {1: single, BATCH: batching}
        for turn in range(ROUNDS + 1):  # the first one warms
            for mix, caches, max_batch in itertools.product((SQUARE, setup.mixed), (False, True), targets):
                asked = with_fields(mix, caches, **setup.fields)
                if not turn:
                    targets[max_batch].warm(asked)
                    continue
                name = "one kind" if len(mix) == 1 else f"{len(mix)} kinds"
                load = setup.load(name, asked, 1 / 8, clients=CLIENTS)
                rounds.setdefault((name, caches, max_batch), [load]).append(targets[max_batch].run(load))
    return [measured(load, runs, *rules) for (_, *rules), (load, *runs) in rounds.items()]


def at_load(setup: Setup) -> list[dict[str, Any]]:
    """Poisson arrivals at 70 % of what each server can do, service times measured before and after."""
    found = []
    with setup.serving(1) as target:
        for caches, share in ((False, 1.0), (True, 0.7)):
            found.append(_at_load(setup, target, target, caches, 1, share))
    # Single requests have to be measured where a free worker waits for no company.
    with setup.serving(BATCH) as target, setup.serving(BATCH, LD_BATCH_TIMEOUT="0") as hasty:
        found.append(_at_load(setup, target, hasty, True, BATCH, 0.7))
    return found


def _at_load(setup: Setup, target: Target, hasty: Target, caches: bool, max_batch: int, share: float) -> Any:
    mix = with_fields(setup.mixed, caches, **setup.fields)
    for one in dict.fromkeys((id(target), id(hasty))):
        (target if one == id(target) else hasty).warm(mix)
    times = measure(hasty, mix, setup.seed)
    before = mean(times, weights(mix))
    capacity = 1 / before
    if max_batch > 1:
        measure_batches(hasty, mix, times, range(1, max_batch + 1), setup.seed)
        capacity = setup.capacity(target, mix)
    load = setup.load(f"{LOAD:.0%} load", mix, share, rate=LOAD * capacity)
    run = target.run(load)
    after = measure(hasty, mix, setup.seed + 1)
    for kind, one in after.items():
        for name in ("alone", "busy"):
            times[kind][name] += one[name]
    drift = mean(after, weights(mix)) / before - 1
    return measured(load, [run], caches, max_batch, times=times, drift=drift, capacity=capacity)


def overload(setup: Setup) -> list[dict[str, Any]]:
    """Three times what the server can do, for a queue of few places."""
    found = []
    for max_batch in (1, BATCH):
        with setup.serving(max_batch, QUEUE) as target:
            mix = with_fields(SQUARE, False, **setup.fields)
            target.warm(mix)
            capacity = setup.capacity(target, mix)
            load = setup.load(f"{OVERLOAD:g} times the capacity", mix, 1 / 2, rate=OVERLOAD * capacity)
            found.append(measured(load, [target.run(load)], False, max_batch, QUEUE, capacity=capacity))
    return found
