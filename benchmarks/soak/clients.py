"""Those who ask: good ones whose pictures are compared, bad ones, some that leave, and one that kills workers."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.soak.hostile import Row, odd_pictures
from benchmarks.soak.server import Server
from benchmarks.soak.wire import Answer, exchange, request

BUSY = {"queue_full", "worker_lost", "not_ready"}
"""Honest answers to a good request while workers are killed and the queue is full."""

Pictures = tuple[bytes, ...]


def good_requests() -> dict[str, dict[str, Any]]:
    """By name; small, so that hundreds are drawn in minutes."""
    small = {"prompt": "a misty forest at twilight", "width": 192, "height": 128, "steps": 6, "seed": 3}
    named: dict[str, dict[str, Any]] = {
        "uncached": small,
        "deepcache": {**small, "deepcache_enabled": True},
        "deepcache deep": {**small, "deepcache_enabled": True, "deepcache_interval": 5, "deepcache_depth": 12},
        "two evaluations": {**small, "sampler": "heun", "steps": 4, "deepcache_enabled": True},
        "several": {**small, "num_images": 3, "batch_size": 2, "deepcache_enabled": True},
        "other size": {**small, "width": 128, "height": 192, "prompt": "a snowy mountain at dawn"},
        "flux": {**small, "flux_enabled": True, "fbcache_threshold": 0.2},
        "flux uncached": {**small, "flux_enabled": True, "fbcache_enabled": False},
        "jpeg": {**small, "output_format": "jpeg"},
        "odd text": {**small, "prompt": "a\u202e\nstormy sea 👩\u200d🚀\x1b[2J", "negative_prompt": "\r\nSteps: 1"},
    }
    for name, text in odd_pictures().items():
        named[f"from {name}"] = {**small, "steps": 4, "img2img_enabled": True, "img2img_image": text}
    return named


def pictures(answer: Answer) -> Pictures:
    body = json.loads(answer.body)
    return tuple(base64.b64decode(text) for text in body.get("images") or [body["image"]])


def _apart(ours: Pictures, theirs: Pictures) -> float:
    """The greatest difference of two channel values; infinite between pictures of other sizes or numbers."""
    if len(ours) != len(theirs):
        return math.inf
    pairs = [(_pixels(one), _pixels(other)) for one, other in zip(ours, theirs, strict=True)]
    return max(float(np.abs(one - other).max()) if one.shape == other.shape else math.inf for one, other in pairs)


def _pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


class Crowd:
    """Threads that ask until told to end; between `pause` and `resume` none of them has a request on its way.

    levels: of 255, how far a picture may be from the expected one; 0: the same bytes.
    tally: how often what was answered. faults: sentences on what must not be.
    """

    def __init__(
        self, server: Server, expected: Mapping[str, Pictures], rows: list[Row], *, seed: int, levels: int = 0
    ) -> None:
        self.server = server
        self.requests = {name: body for name, body in good_requests().items() if name in expected}
        self.expected = expected
        self.rows = rows
        self.levels = levels
        self.tally: Counter[str] = Counter()
        self.faults: list[str] = []
        self.kills = 0
        self.killing = True
        self._seed = seed
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._ended = threading.Event()
        self._busy: Counter[str] = Counter()
        self._threads: list[threading.Thread] = []

    def start(self, good: int = 3) -> None:
        kinds: list[tuple[str, Callable[[random.Random], None]]] = [
            *((f"good {index}", self.ask_well) for index in range(good)),
            ("bad", self.ask_badly),
            ("leaver", self.leave),
            ("killer", self.kill),
            ("jobs", self.ask_later),
        ]
        for number, (name, act) in enumerate(kinds):
            source = random.Random(self._seed * 1000 + number)
            self._threads.append(threading.Thread(target=self._loop, args=(name, act, source), name=name, daemon=True))
        self._open.set()
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        self._open.clear()
        deadline = time.monotonic() + 300
        while any(self._busy.values()):
            if time.monotonic() > deadline:
                self._fault(f"no answer within 300 seconds: {[name for name, busy in self._busy.items() if busy]}")
                return
            time.sleep(0.05)

    def resume(self) -> None:
        self._open.set()

    def end(self) -> None:
        self._ended.set()
        self._open.set()
        for thread in self._threads:
            thread.join(60)

    def _loop(self, name: str, act: Callable[[random.Random], None], source: random.Random) -> None:
        while True:
            self._open.wait()
            self._busy[name] = 1
            if self._ended.is_set():
                return
            if self._open.is_set():
                try:
                    act(source)
                except Exception as error:  # noqa: BLE001  # whatever happens to a client is to be told, not to end it
                    self._fault(f"{name}: {type(error).__name__}: {error}")
                    time.sleep(1)
            self._busy[name] = 0

    def _count(self, word: str) -> None:
        with self._lock:
            self.tally[word] += 1

    def _fault(self, sentence: str) -> None:
        with self._lock:
            self.faults.append(sentence[:300])

    def judge(self, name: str, answer: Answer | None) -> None:
        if answer is None:
            self._fault(f"{name}: no answer")
        elif answer.status != 200:
            self._count(f"good {answer.status} {answer.type}")
            if answer.type not in BUSY:
                self._fault(f"{name}: {answer.status} {answer.body[:200]!r}")
        elif (found := pictures(answer)) == self.expected[name]:
            self._count("good 200, the quiet server's bytes")
        elif (apart := _apart(found, self.expected[name])) <= self.levels and self.levels:
            self._count(f"good 200, {apart:g} levels from the quiet server's")
        else:
            self._fault(f"{name}: not the quiet server's picture, {apart:g} levels from it")

    def ask_well(self, source: random.Random) -> None:
        name = source.choice(list(self.requests))
        self.judge(name, exchange(self.server.address, [request(json.dumps(self.requests[name]))], seconds=240))

    def ask_badly(self, source: random.Random) -> None:
        row = source.choice(self.rows)
        answer = exchange(self.server.address, row.parts(), leave=row.leave, seconds=240)
        status = answer.status if answer else None
        if 200 in row.status and answer is not None and answer.type in BUSY:
            self._count(f"odd {status} {answer.type}")
        elif not row.accepts(answer):
            self._fault(f"{row.name}: {status} {answer.type if answer else ''}, not {row.status} {row.type}")
        else:
            self._count("left" if row.leave else f"odd {status}" if status == 200 else f"bad {status}")

    def leave(self, source: random.Random) -> None:
        """In the queue, while text is read, in a step, in a decode or when all is done: as the moment happens to be."""
        body = {**source.choice(list(self.requests.values())), "steps": source.choice([1, 20, 60])}
        wait = source.choice([0.0, 0.05, 0.2, 0.5, 1.0, 2.0])
        exchange(self.server.address, [request(json.dumps(body)), wait], leave=True)
        self._count("left")
        time.sleep(0.3)

    def kill(self, source: random.Random) -> None:
        """The worker, at a random moment, one time in some seconds."""
        for _ in range(source.randrange(100, 400)):
            if not self._open.wait(0) or not self.killing or self._ended.wait(0.1):
                return
        if (worker := self.server.worker()) is not None and psutil.pid_exists(worker):
            os.kill(worker, signal.SIGKILL)
            self.kills += 1

    def ask_later(self, source: random.Random) -> None:
        """Through /api/jobs: fetched, or cancelled twice at a random moment."""
        name = source.choice(list(self.requests))
        made = exchange(self.server.address, [request(json.dumps(self.requests[name]), path="/api/jobs")])
        if made is None or made.status != 202:
            self.judge(name, made)
            return
        path = f"/api/jobs/{json.loads(made.body)['id']}"
        if source.random() < 0.3:
            time.sleep(source.choice([0.0, 0.1, 0.5]))
            statuses = [self._status(path, "DELETE"), self._status(path, "DELETE")]
            self._count(f"cancelled twice {statuses}")
            if not set(statuses) <= {200, 202, 409}:
                self._fault(f"cancelled twice: {statuses}")
        deadline = time.monotonic() + 240
        while (seen := self._look(path))["state"] in ("queued", "running"):
            if time.monotonic() > deadline:
                self._fault(f"job {name}: still {seen['state']}")
                return
            time.sleep(0.2)
        if seen["state"] == "done":
            self.judge(name, Answer(200, {}, json.dumps(seen["result"]).encode()))
        else:
            kind = (seen.get("error") or {}).get("type")
            self._count(f"job {seen['state']} {kind}")
            if seen["state"] != "cancelled" and kind not in BUSY:
                self._fault(f"job {name}: {seen['state']} {kind}")

    def _status(self, path: str, method: str) -> int | None:
        answer = exchange(self.server.address, [request("", method=method, path=path)])
        return answer.status if answer else None

    def _look(self, path: str) -> dict[str, Any]:
        answer = exchange(self.server.address, [request("", method="GET", path=path)])
        if answer is None or answer.status != 200:
            raise RuntimeError(f"{path}: {answer}")
        found: dict[str, Any] = json.loads(answer.body)
        return found
