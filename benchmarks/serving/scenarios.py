"""What is measured: latency under random arrivals, and three times too much."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.server import running
from benchmarks.serving.load import Load, Target, entry
from benchmarks.serving.plan import Setting, Times, mean
from benchmarks.serving.requests import MIXED, SQUARE, Kind, drawn, with_fields

CLIENTS = 8
LOAD = 0.7  # of the capacity
OVERLOAD = 3.0  # times the capacity
BATCH = 4
QUEUE = CLIENTS  # places of the overloaded server
ALONE, BUSY, BATCHES = 3, 5, 3  # requests of each kind, and of each size of a batch, for its service times


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """`steps`: of every request. `threads`: that the server's worker computes with.

    `seconds`: of an open loop; the others need fewer and take a share of it. A twentieth is an open loop's warm-up.
    """

    steps: int
    threads: int
    seconds: float

    def mix(self, kinds: Sequence[Kind], caches: bool) -> list[Kind]:
        return with_fields(kinds, caches, steps=self.steps)

    def load(self, name: str, mix: Sequence[Kind], share: float, rate: float) -> Load:
        """An open loop of a `share` of the seconds."""
        return Load(name=name, mix=mix, seconds=share * self.seconds, warm_up=self.seconds / 20, rate=rate)

    @contextmanager
    def serving(self, max_batch: int, queue_size: int = 64, **others: str) -> Iterator[Target]:
        """`others`: further environment variables."""
        settings = {"WAVESPEED_DEVICE": "cpu", "WAVESPEED_THREADS": str(self.threads)}
        settings |= {"LD_MAX_BATCH_SIZE": str(max_batch), "WAVESPEED_QUEUE_SIZE": str(queue_size), **others}
        with running(**settings) as server:
            yield Target(server.url, server.process.pid)

    def capacity(self, target: Target, mix: Sequence[Kind]) -> float:
        """Images a second that busy clients get."""
        load = Load(name="busy", mix=mix, seconds=self.seconds / 7, clients=CLIENTS)
        return float(entry(load, *target.run(load))["figures"]["finished"])


def ruled(caches: bool, max_batch: int, queue: int = 64) -> dict[str, Any]:
    """The rules that a plan goes by."""
    return {"caches": caches, "max_batch": max_batch, "queue": queue}


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
    mix = setup.mix(MIXED, caches)
    weights = [(name, weight) for name, weight, _ in mix]
    for one in {target, hasty}:
        one.warm(mix)
    times = measure(hasty, mix, 0)
    before = mean(times, weights)
    capacity = 1 / before
    if max_batch > 1:
        for kind in mix:
            times[kind[0]]["batches"] = _batches(hasty, kind, max_batch)
        capacity = setup.capacity(target, mix)
    load = setup.load(f"{LOAD:.0%} load", mix, share, rate=LOAD * capacity)
    samples, looks = target.run(load)
    after = measure(hasty, mix, 1)
    for kind, name in itertools.product(after, ("alone", "busy")):
        times[kind][name] += after[kind][name]
    drift = mean(after, weights) / before - 1
    found = entry(load, samples, looks, rules=ruled(caches, max_batch), times=times, drift=drift, capacity=capacity)
    arrivals = [(one["scheduled"], one["kind"]) for one in samples]
    return found | {"replayed": Setting.of(found).replayed(arrivals, load.warm_up)}


def overload(setup: Setup) -> list[dict[str, Any]]:
    """Three times what the server can do, for a queue of few places."""
    found = []
    for max_batch in (1, BATCH):
        with setup.serving(max_batch, QUEUE) as target:
            mix = setup.mix(SQUARE, False)
            target.warm(mix)
            capacity = setup.capacity(target, mix)
            load = setup.load(f"{OVERLOAD:g} times the capacity", mix, 1 / 2, rate=OVERLOAD * capacity)
            rules = ruled(False, max_batch, QUEUE)
            found.append(entry(load, *target.run(load), rules=rules, capacity=capacity))
    return found


def measure(target: Target, mix: Sequence[Kind], seed: int) -> Times:
    """Service times, over HTTP, of a server that nobody else asks; kept as the measured values themselves."""
    found: Times = {}
    for kind in mix:
        alone = [round(ended - began, 4) for began, ended in asked(target, kind, ALONE, 1, seed)]
        busy = [round(seconds, 4) for seconds in spacing(asked(target, kind, BUSY + 1, 2, seed))]
        found[kind[0]] = {"alone": alone, "busy": busy, "batches": {"1": 1.0}}
    return found


def _batches(target: Target, kind: Kind, most: int) -> dict[str, float]:
    """Requests for several images stand for batches across requests: either way they are denoised together."""
    name, share, fields = kind
    medians = {}
    for size in range(1, most + 1):
        several = (name, share, {**fields, "num_images": size, "batch_size": size})
        medians[size] = statistics.median(spacing(asked(target, several, BATCHES + 1, 2, 0)))
    return {str(size): round(seconds / medians[1], 4) for size, seconds in medians.items()}


def asked(target: Target, kind: Kind, count: int, clients: int, seed: int) -> list[tuple[float, float]]:
    """When each of `count` requests of a kind was sent and answered, of clients that ask again as soon as they are."""

    def one(request: tuple[str, Mapping[str, Any]]) -> tuple[float, float]:
        began = time.perf_counter()
        target.ask(request[1])
        return began, time.perf_counter()

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, itertools.islice(drawn([kind], seed), count)))


def spacing(times: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds from each end to the next, of two clients' requests: the next one was there before the end."""
    return [later - earlier for earlier, later in itertools.pairwise(sorted(ended for _, ended in times))]
