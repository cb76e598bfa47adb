"""Requests at the same time, with and without batching and DeepCache.

Each picture is held against what the same request gets alone, from a server that batches nothing. Prints a table and,
last, one JSON line.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.cost import ask, bare, picture, request, timed
from benchmarks.report import machine, show, table
from benchmarks.server import Server, running

DEEPCACHE = {"deepcache_enabled": True, "deepcache_preset": "balanced"}


def at_once(server: Server, clients: int, requests: int, steps: int, cached: bool) -> dict[str, Any]:
    """Each of `clients` asks again as soon as it is answered. Pictures by their request's number."""

    def batches() -> float:
        lines = (line.split(" ") for line in server.get("/metrics").text.splitlines())
        return next(float(line[1]) for line in lines if line[0] == "wavespeed_batch_images_count")

    asked = [request(number, steps) | (DEEPCACHE if cached else {}) for number in range(requests)]
    with server.client() as http, ThreadPoolExecutor(clients) as pool:
        before = batches()
        seconds, answers = timed(lambda: list(pool.map(lambda fields: ask(http, fields), asked)))
    each = {"images_per_second": requests / seconds, "images_per_batch": requests / (batches() - before)}
    return {**each, "pictures": [np.asarray(picture(json.loads(answer))).astype(int) for answer in answers]}


def apart(ours: Any, theirs: Any) -> int:
    """The greatest difference of two samples, in levels of 255."""
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(ours, theirs, strict=True))


def main(
    clients: Annotated[int, typer.Option(min=1)] = 8,
    requests: Annotated[int, typer.Option(min=1)] = 32,
    together: Annotated[int, typer.Option(min=1, help="LD_MAX_BATCH_SIZE of the batching server.")] = 4,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    settings = {"WAVESPEED_DEVICE": "cpu", "WAVESPEED_THREADS": str(threads)}
    found = {}
    with (
        running(LD_MAX_BATCH_SIZE="1", **settings) as single,
        running(LD_MAX_BATCH_SIZE=str(together), **settings) as batching,
    ):
        servers = {"one by one": single, "together": batching}
        for server in servers.values():
            at_once(server, 1, 1, 2, cached=False)
        for cached in ("", ", DeepCache"):
            for name, server in servers.items():
                found[name + cached] = at_once(server, clients, requests, steps, bool(cached))
    rows = (f"{name} | {one['images_per_second']:.3f} | {one['images_per_batch']:.3f}" for name, one in found.items())
    show(table("requests | images a second | images a batch", rows))
    alone, batched, cached, both = (one["images_per_second"] for one in found.values())
    pictures = [one["pictures"] for one in found.values()]
    draw, asked = bare(threads), [request(number, steps) for number in range(together)]
    rounding = apart(draw(asked), [draw([one])[0] for one in asked])  # what a batch's size changes in diffusers
    summary = {
        "batching": round(batched / alone, 3),
        "deepcache": round(cached / alone, 3),
        "both": round(both / alone, 3),
        "both_over_product": round(both * alone / (batched * cached), 3),
        "levels_allowed": max(2, 2 * rounding),
        "levels": [apart(*pictures[:2]), apart(*pictures[2:])],
    }
    asked_for = {"clients": clients, "together": together, "steps": steps, "threads": threads}
    print(json.dumps({"benchmark": "batching", **machine(), **asked_for, **summary}))


if __name__ == "__main__":
    typer.run(main)
