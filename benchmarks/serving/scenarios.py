"""What is measured: throughput of busy clients, latency under random arrivals, and three times too much."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.server import SERVE, running
from benchmarks.serving.api import Native
from benchmarks.serving.mix import MIXED, SQUARE, Mix, with_caches, with_fields
from benchmarks.serving.service import ServiceTimes, measure, measure_batches, weights
from benchmarks.serving.target import Load, Run, Target, reaching

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
    mixed: Mix = MIXED
    square: Mix = SQUARE
    fields: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    seconds: float = 100.0
    objective: float = 2.0
    seed: int = 0

    def mix(self, mix: Mix, caches: bool) -> Mix:
        return with_caches(with_fields(mix, **self.fields), caches)

    def load(
        self, name: str, mix: Mix, share: float = 1.0, *, rate: float | None = None, clients: int | None = None
    ) -> Load:
        """`share`: of `seconds`."""
        return Load(
            name=name,
            mix=mix,
            seconds=share * self.seconds,
            warm_up=0.0 if clients else self.seconds / 20,
            objective=self.objective,
            seed=self.seed,
            rate=rate,
            clients=clients,
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """What a server was told, `max_batch` 0 for one that is not ours, and whether requests cached."""

    caches: bool
    max_batch: int
    queue_size: int = 64


@dataclass(slots=True)
class Measured:
    """A run with what was found out around it. `times`: before and after; `capacity`: images a second."""

    rules: Rules
    run: Run
    times: ServiceTimes | None = None
    drift: float | None = None
    capacity: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "rules": {"caches": self.rules.caches, "max_batch": self.rules.max_batch, "queue": self.rules.queue_size},
            "mix": weights(self.run.load.mix),
            **self.run.as_dict(),
            "times": self.times.as_dict() if self.times else None,
            "drift": self.drift,
            "capacity": self.capacity,
        }


@asynccontextmanager
async def serving(setup: Setup, max_batch: int, queue_size: int = 64, **others: str) -> AsyncIterator[Target]:
    """`others`: further environment variables."""
    settings = {
        "WAVESPEED_DEVICE": "cpu",
        "WAVESPEED_THREADS": str(setup.threads),
        "LD_MAX_BATCH_SIZE": str(max_batch),
        "WAVESPEED_QUEUE_SIZE": str(queue_size),
    }
    with running(setup.serve, **(settings | others)) as server:
        host, port = server.address
        async with reaching(f"http://{host}:{port}", Native(), server.process.pid) as target:
            yield target


async def closed(setup: Setup) -> list[Measured]:
    """Eight clients that ask again at once, with and without caches and batches.

    In rounds over all settings, since a machine that is slow for a while should be so for all of them.
    """
    rounds: dict[tuple[str, Rules], list[Run]] = {}
    async with serving(setup, 1) as single, serving(setup, BATCH) as batching:
        targets = {1: single, BATCH: batching}
        for turn in range(ROUNDS + 1):  # the first one warms
            for mix, caches, max_batch in itertools.product((setup.square, setup.mixed), (False, True), targets):
                asked = setup.mix(mix, caches)
                if not turn:
                    await targets[max_batch].warm(asked)
                    continue
                name = "one kind" if len(mix) == 1 else f"{len(mix)} kinds"
                run = await targets[max_batch].run(setup.load(name, asked, 1 / 8, clients=CLIENTS))
                rounds.setdefault((name, Rules(caches, max_batch)), []).append(run)
    return [Measured(rules, Run.joined(runs)) for (_, rules), runs in rounds.items()]


async def at_load(setup: Setup) -> list[Measured]:
    """Poisson arrivals at 70 % of what each server can do, service times measured before and after."""
    found = []
    async with serving(setup, 1) as target:
        for caches, share in ((False, 1.0), (True, 0.7)):
            found.append(await _at_load(setup, target, target, Rules(caches, 1), share))
    # Single requests have to be measured where a free worker waits for no company.
    async with serving(setup, BATCH) as target, serving(setup, BATCH, LD_BATCH_TIMEOUT="0") as hasty:
        found.append(await _at_load(setup, target, hasty, Rules(True, BATCH), 0.7))
    return found


async def _at_load(setup: Setup, target: Target, hasty: Target, rules: Rules, share: float) -> Measured:
    mix = setup.mix(setup.mixed, rules.caches)
    await target.warm(mix)
    if hasty is not target:
        await hasty.warm(mix)
    times = await measure(hasty.ask, mix, seed=setup.seed)
    before = times.mean(weights(mix))
    capacity = 1 / before
    if rules.max_batch > 1:
        await measure_batches(hasty.ask, mix, times, range(1, rules.max_batch + 1), seed=setup.seed)
        capacity = await _capacity(setup, target, mix)
    run = await target.run(setup.load(f"{LOAD:.0%} load", mix, share, rate=LOAD * capacity))
    after = await measure(hasty.ask, mix, seed=setup.seed + 1)
    times.add(after)
    return Measured(rules, run, times, after.mean(weights(mix)) / before - 1, capacity)


async def overload(setup: Setup) -> list[Measured]:
    """Three times what the server can do, for a queue of few places."""
    found = []
    for max_batch in (1, BATCH):
        rules = Rules(caches=False, max_batch=max_batch, queue_size=QUEUE)
        async with serving(setup, max_batch, QUEUE) as target:
            mix = setup.mix(setup.square, False)
            await target.warm(mix)
            capacity = await _capacity(setup, target, mix)
            name = f"{OVERLOAD:g} times the capacity"
            run = await target.run(setup.load(name, mix, 1 / 2, rate=OVERLOAD * capacity))
            found.append(Measured(rules, run, capacity=capacity))
    return found


async def _capacity(setup: Setup, target: Target, mix: Mix) -> float:
    """Images a second that busy clients get."""
    load = setup.load("busy", mix, 1 / 7, clients=CLIENTS)
    return (await target.run(load)).figures.finished
