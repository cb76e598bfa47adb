"""How long a worker is occupied by each kind of request: measured over HTTP, kept as the measured values themselves."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from typing import Any

from benchmarks.serving.load import Target
from benchmarks.serving.requests import Kind, drawn, with_fields

ALONE, BUSY, BATCHES = 3, 5, 3  # requests of each kind, and of each size of a batch

Kinds = Sequence[tuple[str, float]]
"""Names with their shares of all requests, relative to each other."""
Times = dict[str, dict[str, Any]]
"""By kind, seconds. `alone`: latencies in an idle server; `busy`: from one end to the next, while that request waited.

They differ by what does not occupy the worker: reading and writing HTTP, and work that the server does for one request
while it denoises another. `batches`: the time of so many images denoised together, over that of one.
"""


def rest(one: Mapping[str, Any]) -> float:
    """What a request of a kind takes besides the time that it occupies the worker."""
    return statistics.median(one["alone"]) - statistics.median(one["busy"])


def factor(one: Mapping[str, Any], images: int) -> float:
    """Between two measured sizes on the line between them. Raises ValueError past the largest measured batch."""
    sizes = {int(size): float(value) for size, value in one["batches"].items()}
    if images in sizes:
        return sizes[images]
    below, above = max(n for n in sizes if n < images), min((n for n in sizes if n > images), default=0)
    if not above:
        raise ValueError(f"batches of {images} were not measured, only of {sorted(sizes)}")
    return sizes[below] + (sizes[above] - sizes[below]) * (images - below) / (above - below)


def sample(times: Times, kinds: Kinds, count: int, source: random.Random) -> list[float]:
    """Times of a mix's single requests, for the closed forms."""
    names = source.choices([name for name, _ in kinds], [weight for _, weight in kinds], k=count)
    return [source.choice(times[name]["busy"]) for name in names]


def mean(times: Times, kinds: Kinds, images: int = 1) -> float:
    """Of one image of a mix, drawn in batches of so many."""
    each = [weight * statistics.fmean(times[name]["busy"]) * factor(times[name], images) for name, weight in kinds]
    return sum(each) / images / sum(weight for _, weight in kinds)


def weights(mix: Sequence[Kind]) -> list[tuple[str, float]]:
    return [(name, weight) for name, weight, _ in mix]


def measure(target: Target, mix: Sequence[Kind], seed: int) -> Times:
    """Of a server that nobody else asks."""
    found: Times = {}
    for kind in mix:
        alone = [round(ended - began, 4) for began, ended in asked(target, kind, ALONE, 1, seed)]
        busy = [round(seconds, 4) for seconds in spacing(asked(target, kind, BUSY + 1, 2, seed))]
        found[kind[0]] = {"alone": alone, "busy": busy, "batches": {"1": 1.0}}
    return found


def measure_batches(target: Target, mix: Sequence[Kind], times: Times, sizes: Sequence[int], seed: int) -> None:
    """Requests for several images stand for batches across requests: either way they are denoised together."""
    for kind in mix:
        medians = {}
        for size in sizes:
            (several,) = with_fields([kind], num_images=size, batch_size=size)
            medians[size] = statistics.median(spacing(asked(target, several, BATCHES + 1, 2, seed)))
        times[kind[0]]["batches"] = {str(size): round(medians[size] / medians[1], 4) for size in sizes}


def asked(target: Target, kind: Kind, count: int, clients: int, seed: int) -> list[tuple[float, float]]:
    """When each of `count` requests of a kind was sent and answered, of clients that ask again as soon as they are."""

    def one(request: tuple[str, Mapping[str, Any]]) -> tuple[float, float]:
        began = time.perf_counter()
        target.ask(request[1])
        return began, time.perf_counter()

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, islice(drawn([kind], seed), count)))


def spacing(times: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds from each end to the next, of two clients' requests: the next one was there before the end."""
    return [later - earlier for earlier, later in pairwise(sorted(ended for _, ended in times))]
