"""Small requests with and without uploads of many megapixels beside them.

Two runs of one load on a server of its own, whose worker is given up after five seconds without a step; in the second
run some clients send pictures of 16 megapixels at once. Then the memory of the HTTP process before and some seconds
after the last answer. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
import psutil
import typer
from PIL import Image

from benchmarks.cost import ask, timed
from benchmarks.report import machine, percentile, show, table
from benchmarks.server import Server, running

SMALL = {"prompt": "a misty forest at twilight", "width": 192, "height": 128, "steps": 4}
SIDE = 4096  # pixels; 16 megapixels


def upload() -> bytes:
    """A request that draws over a JPEG of SIDE² pixels with some detail."""
    small = np.random.default_rng(0).integers(0, 256, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((SIDE, SIDE)).save(file, "JPEG", quality=90)
    picture = base64.b64encode(file.getvalue()).decode()
    return json.dumps({**SMALL, "img2img_enabled": True, "img2img_denoise": 0.5, "img2img_image": picture}).encode()


def p95(server: Server, requests: int) -> float:
    """Seconds of small requests, one after the other."""
    with server.client() as client:
        found = [timed(lambda seed=seed: ask(client, {**SMALL, "seed": seed}))[0] for seed in range(requests)]
    return round(percentile(found, 0.95), 3)


def beside(uploads: int, server: Server, requests: int) -> tuple[float, dict[str, int]]:
    """p95 of the small ones while so many uploads are on their way, and the statuses that these were answered with."""
    body, headers = upload(), {"Content-Type": "application/json"}

    def send(_: int) -> str:
        with server.client() as client:
            return str(client.post("/api/generate", content=body, headers=headers).status_code)

    with ThreadPoolExecutor(uploads) as pool:
        statuses = pool.map(send, range(uploads))
        found = p95(server, requests)
        return found, dict(sorted(Counter(statuses).items()))


def resident(server: Server) -> float:
    """MB of the HTTP process, its workers not counted."""
    return round(psutil.Process(server.process.pid).memory_info().rss / 2**20, 1)


def main(
    uploads: Annotated[int, typer.Option(min=1)] = 12,
    requests: Annotated[int, typer.Option(min=1)] = 30,
    after: Annotated[float, typer.Option(help="Seconds until the memory is looked at again.")] = 60.0,
) -> None:
    with running(WAVESPEED_STALL_SECONDS="5") as server:
        beside(1, server, 3)  # what the first upload loads stays
        before, alone = resident(server), p95(server, requests)
        crowded, statuses = beside(uploads, server, requests)
        high = resident(server)
        time.sleep(after)
        [device] = server.get("/api/telemetry").json()["devices"]
        row = {
            "p95_alone": alone,
            "p95_beside_uploads": crowded,
            "uploads": statuses,
            "workers_lost": device["restarts"],
            "resident_mb": [before, high, resident(server)],
        }
    show(table(f"{uploads} uploads beside small requests | ", (f"{key} | {value}" for key, value in row.items())))
    print(json.dumps({"benchmark": "uploads", **machine(), **row}))


if __name__ == "__main__":
    typer.run(main)
