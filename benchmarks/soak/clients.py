"""Those who ask: good ones whose pictures are compared, bad ones, some that leave, and one that kills workers."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from benchmarks.server import Server, wait_for
from benchmarks.soak.hostile import Row, odd_pictures
from benchmarks.soak.wire import Answer, exchange, request

BUSY = {"queue_full", "worker_lost", "not_ready"}
"""Honest answers to a good request while workers are killed and the queue is full."""
PATIENCE = 240.0  # seconds for an answer

Pictures = tuple[bytes, ...]


def good_requests() -> dict[str, dict[str, Any]]:
    """By name; small, so that hundreds are drawn in minutes."""
    small = {"prompt": "a misty forest at twilight", "width": 192, "height": 128, "steps": 6, "seed": 3}
    named: dict[str, dict[str, Any]] = {
        "uncached": {},
        "deepcache": {"deepcache_enabled": True},
        "deepcache deep": {"deepcache_enabled": True, "deepcache_interval": 5, "deepcache_depth": 12},
        "two evaluations": {"sampler": "heun", "steps": 4, "deepcache_enabled": True},
        "several": {"num_images": 3, "batch_size": 2, "deepcache_enabled": True},
        "other size": {"width": 128, "height": 192, "prompt": "a snowy mountain at dawn"},
        "flux": {"flux_enabled": True, "fbcache_threshold": 0.2},
        "flux uncached": {"flux_enabled": True, "fbcache_enabled": False},
        "jpeg": {"output_format": "jpeg"},
        "odd text": {"prompt": "a\u202e\nstormy sea 👩\u200d🚀\x1b[2J", "negative_prompt": "\r\nSteps: 1"},
    }
    for name, text in odd_pictures().items():
        named[f"from {name}"] = {"steps": 4, "img2img_enabled": True, "img2img_image": text}
    return {name: small | fields for name, fields in named.items()}


def pictures(body: bytes) -> Pictures:
    told = json.loads(body)
    return tuple(base64.b64decode(text) for text in told.get("images") or [told["image"]])


class Crowd:
    """Threads that ask until told to end; between `pause` and `resume` none of them has a request on its way.

    answers: what was answered, in words. faults: sentences on what must not be.
    """

    def __init__(self, server: Server, expected: Mapping[str, Pictures], rows: Sequence[Row], *, seed: int) -> None:
        self.server, self.expected, self.rows = server, expected, rows
        self.requests = {name: body for name, body in good_requests().items() if name in expected}
        self.answers: list[str] = []
        self.faults: list[str] = []
        self.kills, self.killing = 0, True
        self._open, self._ended = threading.Event(), threading.Event()
        acts = [*[self.ask_well] * 3, self.ask_badly, self.leave, self.kill, self.ask_later]
        self._idle = [threading.Event() for _ in acts]
        self._threads = [
            threading.Thread(target=self._loop, args=(act, idle, seed * 1000 + number), daemon=True)
            for number, (act, idle) in enumerate(zip(acts, self._idle, strict=True))
        ]

    def start(self) -> None:
        self._open.set()
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        """Raises TimeoutError when a request stays without an answer."""
        self._open.clear()
        wait_for(lambda: all(idle.is_set() for idle in self._idle), 300, "an answer to each request")

    def resume(self) -> None:
        self._open.set()

    def end(self) -> None:
        self._ended.set()
        self._open.set()
        for thread in self._threads:
            thread.join(60)

    def _loop(self, act: Any, idle: threading.Event, seed: int) -> None:
        source = random.Random(seed)
        while not self._ended.is_set():
            idle.clear()
            if self._open.is_set():
                try:
                    act(source)
                except Exception as error:  # noqa: BLE001  # whatever happens to a client is to be told, not to end it
                    self._fault(f"{act.__name__}: {type(error).__name__}: {error}")
                    time.sleep(1)
            idle.set()
            self._open.wait()

    def _fault(self, sentence: str) -> None:
        self.faults.append(sentence[:300])

    def _exchange(self, body: Mapping[str, Any], **how: Any) -> Answer | None:
        return exchange(self.server.address, [request(json.dumps(body), **how)], seconds=PATIENCE)

    def ask(self, name: str) -> None:
        self.judge(name, self._exchange(self.requests[name]))

    def judge(self, name: str, answer: Answer | None) -> None:
        if answer is None:
            self._fault(f"{name}: no answer")
        elif answer.status != 200:
            self.answers.append(f"good {answer.status} {answer.type}")
            if answer.type not in BUSY:
                self._fault(f"{name}: {answer.status} {answer.body[:200]!r}")
        elif pictures(answer.body) == self.expected[name]:
            self.answers.append("good 200, the quiet server's bytes")
        else:
            self._fault(f"{name}: not the quiet server's picture")

    def ask_well(self, source: random.Random) -> None:
        self.ask(source.choice(list(self.requests)))

    def ask_badly(self, source: random.Random) -> None:
        row = source.choice(self.rows)
        answer = exchange(self.server.address, row.parts, leave=row.leave, seconds=PATIENCE)
        status, kind = (answer.status, answer.type) if answer else ("left" if row.leave else "closed", None)
        if not row.accepts(answer) and not (200 in row.status and kind in BUSY):
            self._fault(f"{row.name}: {status} {kind}, not {row.status} {row.type}")
        self.answers.append(f"odd or bad {status}")

    def leave(self, source: random.Random) -> None:
        """In the queue, while text is read, in a step, in a decode or when all is done: as the moment happens to be."""
        body = {**source.choice(list(self.requests.values())), "steps": source.choice([1, 20, 60])}
        seconds = source.choice([0.0, 0.05, 0.2, 0.5, 1.0, 2.0])
        exchange(self.server.address, [request(json.dumps(body)), seconds], leave=True)
        self.answers.append("left")
        time.sleep(0.3)

    def kill(self, source: random.Random) -> None:
        """The worker, at a random moment, one time in some seconds."""
        for _ in range(source.randrange(100, 400)):
            if not self._open.is_set() or not self.killing or self._ended.wait(0.1):
                return
        if (worker := self.server.worker()) is not None and psutil.pid_exists(worker):
            os.kill(worker, signal.SIGKILL)
            self.kills += 1

    def ask_later(self, source: random.Random) -> None:
        """Through /api/jobs: fetched, or cancelled twice at a random moment."""
        name = source.choice(list(self.requests))
        made = self._exchange(self.requests[name], path="/api/jobs")
        if made is None or made.status != 202:
            self.judge(name, made)
            return
        path = f"/api/jobs/{json.loads(made.body)['id']}"
        if source.random() < 0.3:
            time.sleep(source.choice([0.0, 0.1, 0.5]))
            twice = [self._exchange({}, method="DELETE", path=path) for _ in range(2)]
            statuses = [answer and answer.status for answer in twice]
            self.answers.append(f"cancelled twice {statuses}")
            if not set(statuses) <= {200, 202, 409}:
                self._fault(f"cancelled twice: {statuses}")

        def ended() -> dict[str, Any] | None:
            answer = self._exchange({}, method="GET", path=path)
            if answer is None or answer.status != 200:
                raise RuntimeError(f"{path}: {answer}")
            seen: dict[str, Any] = json.loads(answer.body)
            return None if seen["state"] in ("queued", "running") else seen

        seen: Any = wait_for(ended, PATIENCE, f"the end of job {name}")
        if seen["state"] == "done":
            self.judge(name, Answer(200, {}, json.dumps(seen["result"]).encode()))
        else:
            kind = (seen.get("error") or {}).get("type")
            self.answers.append(f"job {seen['state']} {kind}")
            if seen["state"] != "cancelled" and kind not in BUSY:
                self._fault(f"job {name}: {seen['state']} {kind}")
