"""`python -m benchmarks.uploads`: small requests with and without uploads of many megapixels beside them.

Two runs of one load on a server of its own, whose worker is given up after five seconds without a step; in the second
run `--uploads` clients send pictures of 16 megapixels at once. Then the memory of the HTTP process before and
`--after` seconds after the last answer. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.server import Server, running

SMALL = {"prompt": "a misty forest at twilight", "width": 192, "height": 128, "steps": 4}
LARGE = {**SMALL, "img2img_enabled": True, "img2img_denoise": 0.5}
SIDE = 4096  # pixels; 16 megapixels


def photograph() -> str:
    """A JPEG of SIDE² pixels with some detail, base64."""
    small = np.random.default_rng(0).integers(0, 256, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((SIDE, SIDE)).save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()


def seconds_of(server: Server, requests: int) -> list[float]:
    """Of small requests, one after the other."""
    found = []
    with server.client() as client:
        for seed in range(requests):
            begun = time.monotonic()
            client.post("/api/generate", json={**SMALL, "seed": seed}).raise_for_status()
            found.append(time.monotonic() - begun)
    return found


def beside(uploads: int, server: Server, work: Callable[[], list[float]]) -> tuple[list[float], list[int]]:
    """What `work` gives while so many uploads are on their way, and the statuses that these were answered with."""
    body = json.dumps({**LARGE, "img2img_image": photograph()}).encode()
    statuses: list[int] = []

    def send() -> None:
        with server.client() as client:
            headers = {"Content-Type": "application/json"}
            statuses.append(client.post("/api/generate", content=body, headers=headers).status_code)

    threads = [threading.Thread(target=send) for _ in range(uploads)]
    for thread in threads:
        thread.start()
    found = work()
    for thread in threads:
        thread.join()
    return found, statuses


def resident(server: Server) -> float:
    """MB of the HTTP process, its workers not counted."""
    return float(psutil.Process(server.process.pid).memory_info().rss / 2**20)


def p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uploads")
    parser.add_argument("--uploads", type=int, default=12)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--after", type=float, default=60.0, help="Seconds until the memory is looked at again.")
    options = parser.parse_args()
    with running(WAVESPEED_STALL_SECONDS="5") as server:
        seconds_of(server, 3)
        beside(1, server, list)  # what the first upload loads stays
        before = resident(server)
        alone = seconds_of(server, options.requests)
        crowded, statuses = beside(options.uploads, server, lambda: seconds_of(server, options.requests))
        high = resident(server)
        time.sleep(options.after)
        [device] = httpx.get(f"{server.url}/api/telemetry").json()["devices"]
        row: dict[str, Any] = {
            "p95_alone": round(p95(alone), 3),
            "p95_beside_uploads": round(p95(crowded), 3),
            "uploads": {str(status): statuses.count(status) for status in sorted(set(statuses))},
            "workers_lost": device["restarts"],
            "resident_mb": [round(before, 1), round(high, 1), round(resident(server), 1)],
        }
    for name, value in row.items():
        print(f"{name:<20} {value}")
    print(json.dumps({"benchmark": "uploads", **row}))


if __name__ == "__main__":
    main()
