"""A load against a server, and what it came to: latencies, finished images, refusals, memory and the queue."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil

from benchmarks.report import ROOT, percentile
from benchmarks.serving.requests import PATH, Kind, answer, drawn

LOOK_SECONDS = 0.5
WARM_LOOKS = 3
PATIENCE = 600.0  # seconds for an answer
MOST_USERS = 1000  # that wait for answers in an open loop; more arrivals are late

Sample = dict[str, Any]
"""One request: its kind, when it was scheduled, sent and finished, in seconds of the load, and what `answer` says."""
Look = tuple[float, int, int, int | None]
"""Seconds of the load, resident bytes of the server's process and of all below it, and how many wait, if it tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`rate` a second in an open loop, `clients` in a closed one; the `warm_up` of the `seconds` is left out."""

    name: str
    mix: Sequence[Kind]
    seconds: float
    warm_up: float = 0.0
    objective: float = 2.0
    seed: int = 0
    rate: float | None = None
    clients: int | None = None


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process from 0 up to `seconds`, given that as many come as `rate` a second says.

    Each comes at any time, as likely as at another. Their number is not left to luck: a run of minutes would miss its
    load by some per cent, and its waits by many.
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

    def warm(self, mix: Sequence[Kind], times: int = 2) -> None:
        """So that no model is loaded and no library woken in what is measured."""
        for kind in mix:
            for _, (_, fields) in zip(range(times), drawn([kind], 0), strict=False):
                self.ask(fields)

    def run(self, load: Load) -> tuple[list[Sample], list[Look]]:
        arrivals = None if load.rate is None else poisson(load.rate, load.seconds, load.seed)
        users = load.clients or min(len(arrivals or ()), MOST_USERS)
        order = {**asdict(load), "url": self.url, "arrivals": arrivals, "users": users, "patience": PATIENCE}
        looks: list[Look] = []
        with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as told:
            json.dump(order, asked)
            asked.seek(0)
            command = [sys.executable, "-m", "benchmarks.serving.generator"]
            with subprocess.Popen(command, stdin=asked, stdout=told, cwd=ROOT) as process:
                while process.poll() is None:
                    looks.append(self._look())
                    time.sleep(LOOK_SECONDS)
            if process.returncode:
                raise RuntimeError("the load's own process failed")
            told.seek(0)
            began, *samples = (json.loads(line) for line in told)
        return samples, [(at - began, *rest) for at, *rest in looks if at >= began]

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
        return time.monotonic(), server, below, waiting


def entry(load: Load, rounds: Sequence[tuple[Sequence[Sample], Sequence[Look]]], **more: Any) -> dict[str, Any]:
    """What was measured, ready for JSON; of several rounds as if one began when the one before was answered.

    points: for each request schedule, latency, status, kind, wait and service. The seconds that count are those from
    the warm-up to the end of the schedule, or of a closed loop to the last answer. `more`: the server's rules; service
    times, their drift and the capacity in images a second, where they were measured.
    """
    samples: list[Sample] = []
    looks: list[Look] = []
    windows, began = [], 0.0
    for some, seen in rounds:
        last = max((one["finished"] for one in some), default=load.seconds)
        until = math.nextafter(last if load.clients else load.seconds, math.inf)
        windows.append((began + load.warm_up, began + until))
        samples += [one | {name: one[name] + began for name in ("scheduled", "sent", "finished")} for one in some]
        looks += [(at + began, *rest) for at, *rest in seen]
        began += max(load.seconds, last)
    names = ("name", "seed", "rate", "clients", "seconds", "warm_up")
    return {
        "mix": [(name, weight) for name, weight, _ in load.mix],
        **{name: getattr(load, name) for name in names},
        "rounds": len(rounds),
        "figures": figures(samples, windows, load.objective),
        "held": held([one for one in looks if one[0] >= load.warm_up], samples),
        "points": [_point(one) for one in samples],
        "looks": [[round(at, 2), *rest] for at, *rest in looks],
        **more,
    }


def _point(one: Sample) -> list[Any]:
    seconds = (one["queue"], one["service"])
    known = [None if value is None else round(value, 4) for value in seconds]
    return [round(one["scheduled"], 4), round(latency(one), 4), one["status"], one["kind"], *known]


def latency(one: Sample) -> float:
    seconds: float = one["finished"] - one["scheduled"]
    return seconds


def figures(samples: Sequence[Sample], windows: Sequence[tuple[float, float]], objective: float) -> dict[str, Any]:
    """Of what was scheduled within the windows (from and up to when), `seconds` long together.

    offered: requests a second; finished: images a second, of answers that came within a window, whenever they were
    asked for, the median over the windows. latency: of requests that got their pictures; wait: how long they queued, as
    the server says; both are None where there is none. within: share of all requests that got their pictures within the
    objective, so a refused one is a miss; goodput: those a second. late: between schedule and sending, the client's own
    fault.
    """
    seconds = sum(until - since for since, until in windows)
    counted = [one for one in samples if any(since <= one["scheduled"] < until for since, until in windows)]
    answered = [one for one in counted if one["status"] == 200]
    refused = [one for one in counted if one["status"] in (429, 503)]
    good = sum(latency(one) <= objective for one in answered)
    computed, reused = (sum(one[name] for one in answered) for name in ("computed", "reused"))
    finished = [
        sum(one["images"] for one in samples if since <= one["finished"] < until) / (until - since)
        for since, until in windows
    ]
    return {
        "seconds": seconds,
        "requests": len(counted),
        "offered": len(counted) / seconds,
        "finished": statistics.median(finished),
        "latency": spread([latency(one) for one in answered]),
        "wait": spread([one["queue"] for one in answered if one["queue"] is not None]),
        "objective": objective,
        "within": good / len(counted) if counted else math.nan,
        "goodput": good / seconds,
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
    """Megabytes at the end and their growth, of the server's process and its workers, where they are known.

    Growth: of the median of the last third of the looks over that of the first, as a share. Besides, the longest queue
    that was seen and the longest service, in seconds.
    """
    waiting = [look[3] for look in looks if look[3] is not None]
    services = [one["service"] for one in samples if one["service"] is not None]
    found = {"waiting_most": max(waiting, default=None), "service_longest": max(services, default=None)}
    for place, part in enumerate(("server", "workers"), start=1):
        values = [look[place] for look in looks]
        known, third = bool(values and values[-1]), max(1, len(values) // 3)
        grown = known and len(values) >= WARM_LOOKS
        growth = statistics.median(values[-third:]) / statistics.median(values[:third]) - 1 if grown else None
        found[f"{part}_mb"] = round(values[-1] / 1e6, 1) if known else None
        found[f"{part}_growth"] = None if growth is None else round(growth, 4)
    return found
