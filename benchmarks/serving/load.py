"""A load against a server, and what it came to: latencies, finished images, refusals, memory and the queue."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil

from benchmarks.report import ROOT, percentile
from benchmarks.serving.requests import PATH, Kind, answer, drawn

LOOK_SECONDS = 0.5
PATIENCE = 600.0  # seconds for an answer
MOST_USERS = 1000  # that wait for answers in an open loop; more arrivals are late

Sample = dict[str, Any]
"""One request: its kind, when it was scheduled, sent and finished, in seconds of the load, and what `answer` says."""
Look = dict[str, Any]
"""`at`, seconds of the load; resident bytes of the `server` process and of its `workers`; how many are `waiting`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`rate` a second in an open loop, `clients` in a closed one; the `warm_up` of the `seconds` is left out."""

    name: str
    mix: Sequence[Kind]
    seconds: float
    warm_up: float = 0.0
    objective: float = 2.0
    rate: float | None = None
    clients: int | None = None


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Arrival times of a Poisson process from 0 up to `seconds`, given that as many come as `rate` a second says.

    Their number is not left to luck: a run of minutes would miss its load by some per cent, and its waits by many.
    """
    source = random.Random(seed)
    return sorted(source.uniform(0, seconds) for _ in range(round(rate * seconds)))


@dataclass(frozen=True, slots=True)
class Target:
    """A server that runs. `pid`: of one of our own, whose memory is watched."""

    url: str
    pid: int | None = None

    def ask(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """One request outside of any load. Raises RuntimeError unless it gets its pictures, and httpx.HTTPError."""
        got = httpx.post(self.url + PATH, json=fields, timeout=PATIENCE)
        if (told := answer(got.status_code, got.text, got.headers))["status"] != 200:
            raise RuntimeError(f"answered {told['status']}, {told['error']}")
        return told

    def warm(self, mix: Sequence[Kind]) -> None:
        """So that no model is loaded and no library woken in what is measured."""
        for kind in mix:
            for _, fields in itertools.islice(drawn([kind], 0), 2):
                self.ask(fields)

    def run(self, load: Load) -> tuple[list[Sample], list[Look]]:
        arrivals = None if load.rate is None else poisson(load.rate, load.seconds)
        users = load.clients or min(len(arrivals or ()), MOST_USERS)
        order = {**asdict(load), "url": self.url, "arrivals": arrivals, "users": users, "patience": PATIENCE}
        command = [sys.executable, "-m", "benchmarks.serving.generator"]
        given: Any = {"input": json.dumps(order), "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "check": True}
        looks: list[Look] = []
        with ThreadPoolExecutor(1) as pool:
            ran = pool.submit(subprocess.run, command, **given)
            while not ran.done():
                looks.append(self._look())
                time.sleep(LOOK_SECONDS)
        began, *samples = map(json.loads, ran.result().stdout.splitlines())
        return samples, [look | {"at": look["at"] - began} for look in looks if look["at"] >= began]

    def _look(self) -> Look:
        server, below, waiting = 0, 0, None
        with suppress(httpx.HTTPError, KeyError, ValueError):
            waiting = httpx.get(f"{self.url}/api/telemetry").json()["pending_count"]
        if self.pid is not None:
            process = psutil.Process(self.pid)
            server = process.memory_info().rss
            for child in process.children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # ended between two looks
                    below += child.memory_info().rss
        return {"at": time.monotonic(), "server": server, "workers": below, "waiting": waiting}


def entry(load: Load, samples: Sequence[Sample], looks: Sequence[Look], **more: Any) -> dict[str, Any]:
    """What was measured, ready for JSON.

    The seconds that count are those from the warm-up to the end of the schedule, or of a closed loop to the last
    answer. `more`: the server's rules; service times, their drift and the capacity in images a second.
    """
    last = max((one["finished"] for one in samples), default=load.seconds)
    until = math.nextafter(last if load.clients else load.seconds, math.inf)
    return {
        "name": load.name,
        "mix": [(name, weight) for name, weight, _ in load.mix],
        "figures": figures(samples, load.warm_up, until, load.objective),
        "held": held([look for look in looks if look["at"] >= load.warm_up], samples),
        **more,
    }


def latency(one: Sample) -> float:
    return float(one["finished"] - one["scheduled"])


def figures(samples: Sequence[Sample], since: float, until: float, objective: float) -> dict[str, Any]:
    """Of what was scheduled between the two seconds.

    offered: requests a second; finished: images a second, of answers that came then, whenever they were asked for.
    latency: of requests that got their pictures; wait: how long they queued, as the server says; both are None where
    there is none. within: share of all requests that got their pictures within the objective, so a refused one is a
    miss; goodput: those a second. late: between schedule and sending, the client's own fault.
    """
    counted = [one for one in samples if since <= one["scheduled"] < until]
    answered = [one for one in counted if one["status"] == 200]
    refused = [one for one in counted if one["status"] in (429, 503)]
    good = sum(latency(one) <= objective for one in answered)
    computed, reused = (sum(one[name] for one in answered) for name in ("computed", "reused"))
    return {
        "requests": len(counted),
        "offered": len(counted) / (until - since),
        "finished": sum(one["images"] for one in samples if since <= one["finished"] < until) / (until - since),
        "latency": spread([latency(one) for one in answered]),
        "wait": spread([one["queue"] for one in answered if one["queue"] is not None]),
        "objective": objective,
        "within": good / len(counted) if counted else math.nan,
        "goodput": good / (until - since),
        "hit_rate": reused / (computed + reused) if computed + reused else None,
        "statuses": {str(status): count for status, count in sorted(Counter(one["status"] for one in counted).items())},
        "without_retry_after": sum(not one["retry_after"] for one in refused),
        "late": percentile([one["sent"] - one["scheduled"] for one in counted], 0.99),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Seconds: the mean and three percentiles; None of nothing."""
    if not values:
        return None
    named = {f"p{100 * share:.0f}": percentile(values, share) for share in (0.5, 0.95, 0.99)}
    return {"mean": statistics.fmean(values), **named}


def held(looks: Sequence[Look], samples: Sequence[Sample]) -> dict[str, Any]:
    """The longest queue and service that were seen, and megabytes at the end with their growth, where they are known.

    Growth: of the median of the last third of the looks over that of the first, as a share.
    """
    waiting = [look["waiting"] for look in looks if look["waiting"] is not None]
    services = [one["service"] for one in samples if one["service"] is not None]
    found = {"waiting_most": max(waiting, default=None), "service_longest": max(services, default=None)}
    for part in ("server", "workers"):
        sizes = [look[part] for look in looks if look[part]]
        third = len(sizes) // 3
        found[f"{part}_mb"] = round(sizes[-1] / 1e6, 1) if sizes else None
        growth = statistics.median(sizes[-third:]) / statistics.median(sizes[:third]) - 1 if third else None
        found[f"{part}_growth"] = growth
    return found
