"""What the server holds and how many wait in it, looked at while a load goes on."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import psutil

LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Look:
    """`at`: seconds since the beginning. Resident bytes of the server's process and of its children together.

    `waiting`: None where the server does not tell.
    """

    at: float
    server: int
    workers: int
    waiting: int | None


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process and of all its descendants."""
    process = psutil.Process(pid)
    below = 0
    for child in process.children(recursive=True):
        try:
            below += child.memory_info().rss
        except psutil.NoSuchProcess:  # ended between two looks
            continue
    return process.memory_info().rss, below


@asynccontextmanager
async def watching(pid: int | None, client: httpx.AsyncClient, *, telemetry: bool) -> AsyncIterator[list[Look]]:
    """The looks so far. Without a `pid` (a server of somebody else's) memory is 0; without telemetry nobody waits."""
    looks: list[Look] = []
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def look() -> None:
        while True:
            server, workers = resident(pid) if pid is not None else (0, 0)
            looks.append(Look(loop.time() - started, server, workers, await _waiting(client) if telemetry else None))
            await asyncio.sleep(LOOK_SECONDS)

    task = asyncio.create_task(look())
    try:
        yield looks
    finally:
        task.cancel()


async def _waiting(client: httpx.AsyncClient) -> int | None:
    try:
        return int((await client.get("/api/telemetry")).json()["pending_count"])
    except (httpx.HTTPError, KeyError, ValueError):
        return None


def growth(values: Sequence[int]) -> float:
    """Of the median of the last third over that of the first, as a share. Raises ValueError under three values."""
    third = len(values) // 3
    if not third:
        raise ValueError(f"{len(values)} looks are too few to see growth")
    return statistics.median(values[-third:]) / statistics.median(values[:third]) - 1
