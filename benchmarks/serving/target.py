"""A server under load: one client of it, and what a load against it came to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import httpx

from benchmarks.serving.api import Answer, Api, Native, ask
from benchmarks.serving.figures import Figures, figures
from benchmarks.serving.load import Sample, closed_loop, open_loop, poisson
from benchmarks.serving.mix import Kind, Mix, Request, drawn
from benchmarks.serving.watch import Look, growth, watching

PATIENCE = 600.0  # seconds for an answer
WARM_LOOKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`rate` a second in an open loop, `clients` in a closed one; the `warm_up` of the `seconds` is left out."""

    name: str
    mix: Mix
    seconds: float
    warm_up: float
    objective: float
    seed: int = 0
    rate: float | None = None
    clients: int | None = None


@dataclass(slots=True)
class Run:
    """`windows`: the seconds that count, of each round that was made.

    If none are given: one, from the warm-up to the end of the schedule, or of a closed loop to the last answer.
    """

    load: Load
    samples: list[Sample]
    looks: list[Look] = field(repr=False)
    windows: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.windows:
            ends = [one.finished for one in self.samples if self.load.clients]
            self.windows = [(self.load.warm_up, math.nextafter(max(ends, default=self.load.seconds), math.inf))]

    @classmethod
    def joined(cls, rounds: Sequence[Run]) -> Run:
        """Rounds of one load, as if the second had begun when the first was answered."""
        whole = Run(rounds[0].load, [], [], [(0.0, 0.0)])
        whole.windows, began = [], 0.0
        for one in rounds:
            whole.samples += [
                replace(s, scheduled=s.scheduled + began, sent=s.sent + began, finished=s.finished + began)
                for s in one.samples
            ]
            whole.looks += [replace(look, at=look.at + began) for look in one.looks]
            whole.windows += [(since + began, until + began) for since, until in one.windows]
            began += max(one.load.seconds, *(s.finished for s in one.samples))
        return whole

    @property
    def figures(self) -> Figures:
        return figures(self.samples, self.windows, self.load.objective)

    def held(self) -> dict[str, Any]:
        """Megabytes at the end and growth since the warm-up, of the server's process and its workers.

        Besides, the longest queue that was seen and the longest service, in seconds.
        """
        looks = [look for look in self.looks if look.at >= self.load.warm_up]
        services = [one.answer.service for one in self.samples if one.answer.service is not None]
        waiting = [look.waiting for look in looks if look.waiting is not None]
        found: dict[str, Any] = {
            "waiting_most": max(waiting, default=None),
            "service_longest": max(services, default=None),
        }
        for part in ("server", "workers"):
            values = [getattr(look, part) for look in looks]
            found[f"{part}_mb"] = round(values[-1] / 1e6, 1) if values and values[-1] else None
            known = len(values) >= WARM_LOOKS and values[-1]
            found[f"{part}_growth"] = round(growth(values), 4) if known else None
        return found

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON. `points`: for each request schedule, latency, status, kind, wait and service."""
        load = self.load
        asked = {"rate": load.rate, "clients": load.clients, "seconds": load.seconds, "warm_up": load.warm_up}
        points = [_point(one) for one in self.samples]
        looks = [[round(look.at, 2), look.server, look.workers, look.waiting] for look in self.looks]
        return {
            "name": load.name,
            "seed": load.seed,
            **asked,
            "rounds": len(self.windows),
            "figures": asdict(self.figures),
            "held": self.held(),
            "points": points,
            "looks": looks,
        }


def _point(one: Sample) -> list[Any]:
    seconds = (one.answer.queue, one.answer.service)
    known = [None if value is None else round(value, 4) for value in seconds]
    return [round(one.scheduled, 4), round(one.latency, 4), one.answer.status, one.kind, *known]


@dataclass(frozen=True, slots=True)
class Target:
    """`pid`: of a server of our own, whose memory is watched. `api` Native: its queue is, too."""

    client: httpx.AsyncClient
    api: Api
    pid: int | None = None

    @property
    def ask(self) -> Callable[[Request], Any]:
        return partial(ask, self.client, self.api)

    async def run(self, load: Load) -> Run:
        requests = drawn(load.mix, load.seed)
        async with watching(self.pid, self.client, telemetry=isinstance(self.api, Native)) as looks:
            if load.rate is not None:
                arrivals = poisson(load.rate, load.seconds, load.seed)
                samples = await open_loop(self.ask, arrivals, requests)
            else:
                samples = await closed_loop(self.ask, load.clients or 1, requests, seconds=load.seconds)
        return Run(load, samples, looks)

    async def warm(self, mix: Sequence[Kind], times: int = 2) -> None:
        """So that no model is loaded and no library woken in what is measured. Raises RuntimeError on a refusal."""
        for kind in mix:
            for request in islice(drawn([kind], 0), times):
                answer: Answer = await self.ask(request)
                if answer.status != 200:
                    raise RuntimeError(f"{kind.name}: answered {answer.status}, {answer.error}")


@asynccontextmanager
async def reaching(url: str, api: Api, pid: int | None = None, key: str | None = None) -> AsyncIterator[Target]:
    """As many connections as there are requests on their way: none waits for another in the client."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, headers=headers) as client:
        yield Target(client, api, pid)
        await asyncio.sleep(0)
