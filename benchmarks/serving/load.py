"""Open and closed loops of requests, and what became of each.

In an open loop a latency counts from the arrival that was scheduled, not from when the client came to send it: a client
that is held up by a slow server and measures from the sending leaves out the waits that matter ("coordinated omission",
Tene, How NOT to measure latency, 2013).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.serving.api import Answer
from benchmarks.serving.mix import Request

Ask = Callable[[Request], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Seconds count from the beginning of the load."""

    kind: str
    scheduled: float
    sent: float
    finished: float
    answer: Answer

    @property
    def ok(self) -> bool:
        return self.answer.status == 200

    @property
    def latency(self) -> float:
        return self.finished - self.scheduled


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process from 0 up to `seconds`, given that as many come as `rate` a second says.

    Each comes at any time, as likely as at another. Their number is not left to luck: a run of minutes would miss its
    load by some per cent, and its waits by many.
    """
    source = random.Random(seed)
    return sorted(source.uniform(0, seconds) for _ in range(round(rate * seconds)))


async def open_loop(ask: Ask, arrivals: Sequence[float], requests: Iterator[Request]) -> list[Sample]:
    """Each request at its time, whether or not those before it are answered; in the order of their arrival."""
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def one(at: float, request: Request) -> Sample:
        await asyncio.sleep(started + at - loop.time())
        sent = loop.time() - started
        answer = await ask(request)
        return Sample(request.kind, at, sent, loop.time() - started, answer)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(at, request)) for at, request in zip(arrivals, requests, strict=False)]
    return [task.result() for task in tasks]


async def closed_loop(
    ask: Ask, clients: int, requests: Iterator[Request], *, seconds: float | None = None, count: int | None = None
) -> list[Sample]:
    """`clients` that ask again as soon as they are answered, until `seconds` are over or `count` requests are sent.

    Nothing is scheduled: a request counts from its sending, so a slow server is asked less.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    samples: list[Sample] = []
    left = count

    async def client() -> None:
        nonlocal left
        while (seconds is None or loop.time() - started < seconds) and left != 0:
            if left is not None:
                left -= 1
            request = next(requests)
            sent = loop.time() - started
            answer = await ask(request)
            samples.append(Sample(request.kind, sent, sent, loop.time() - started, answer))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return samples
