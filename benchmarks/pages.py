"""Small requests with and without open pages beside them.

One server with its page, in rounds: nobody looks; some pages are open, each doing what a browser does by itself; they
are used, a rerun of each one's script a second, as by somebody who moves a slider. Prints a table and, last, one JSON
line.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Annotated

import typer
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.cost import ask, timed
from benchmarks.report import machine, percentile, show, table
from benchmarks.server import Server, running
from benchmarks.uploads import SMALL, resident

RERUN_SECONDS = 1.0  # of a page that is used
PACE = 0.01  # seconds between two looks at an address


async def visit(url: str, used: bool) -> None:
    """A page as a browser has it: its script is run once, then its parts as often as they say."""
    from streamlit.proto.BackMsg_pb2 import BackMsg
    from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

    async with connect(url, subprotocols=["streamlit"], max_size=None, ping_interval=None) as socket:  # type: ignore[list-item]

        async def rerun(every: float, fragment: str = "") -> None:
            while True:
                await asyncio.sleep(every)
                message = BackMsg()
                message.rerun_script.fragment_id = fragment
                message.rerun_script.is_auto_rerun = bool(fragment)
                await socket.send(message.SerializeToString())

        async def receive(connection: ClientConnection) -> None:
            repeating: dict[str, asyncio.Task[None]] = {}
            async for data in connection:
                message = ForwardMsg.FromString(data if isinstance(data, bytes) else data.encode())
                if message.HasField("auto_rerun") and message.auto_rerun.fragment_id not in repeating:
                    name = message.auto_rerun.fragment_id
                    repeating[name] = asyncio.create_task(rerun(message.auto_rerun.interval, name))

        first = BackMsg()
        first.rerun_script.query_string = ""
        await socket.send(first.SerializeToString())
        await asyncio.gather(receive(socket), *([rerun(RERUN_SECONDS)] if used else []))


def visits(url: str, pages: int, used: bool) -> None:
    async def every() -> None:
        await asyncio.gather(*(visit(url, used) for _ in range(pages)))

    asyncio.run(every())


@contextmanager
def open_pages(server: Server, pages: int, *, used: bool) -> Iterator[None]:
    """In a process of their own, as browsers are."""
    url = "ws://{}:{}/_stcore/stream".format(*server.address)
    process = multiprocessing.get_context("spawn").Process(target=visits, args=(url, pages, used))
    process.start()
    try:
        time.sleep(4)  # until each has run its script
        assert process.is_alive(), "the pages could not be opened"
        yield
    finally:
        process.kill()
        process.join()


def p95(look: Callable[[int], object], requests: int, pace: float) -> float:
    """Milliseconds of requests one after the other."""
    found = []
    for number in range(requests):
        found.append(timed(lambda number=number: look(number))[0])
        time.sleep(pace)
    return round(1000 * percentile(found, 0.95), 1)


def main(
    pages: Annotated[int, typer.Option(min=1)] = 10,
    requests: Annotated[int, typer.Option(min=20, help="Of each kind in a round.")] = 100,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    with running(WAVESPEED_PAGE="true") as server, server.client() as client:
        looks: dict[str, tuple[Callable[[int], object], float]] = {
            "GET /api/models": (lambda _: client.get("/api/models").raise_for_status(), PACE),
            "POST /api/generate": (lambda seed: ask(client, {**SMALL, "seed": seed}), 0.0),
        }
        found: dict[tuple[str, str], list[float]] = {}
        memory = {}

        def measure(condition: str) -> None:
            for name, (look, pace) in looks.items():
                found.setdefault((name, condition), []).append(p95(look, requests, pace))
            memory[condition] = resident(server)

        for _ in range(rounds):
            measure("no page")
            with open_pages(server, pages, used=False):
                measure(f"{pages} open")
            with open_pages(server, pages, used=True):
                measure(f"{pages} used")
    rows = {f"{name}, {condition}": median(values) for (name, condition), values in found.items()}
    show(table("p95 beside pages, ms | median of rounds", (f"{key} | {value}" for key, value in rows.items())))
    print(json.dumps({"benchmark": "pages", **machine(), "p95_ms": rows, "resident_mb": memory}))


if __name__ == "__main__":
    typer.run(main)
