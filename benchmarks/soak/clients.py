"""Those who ask: good ones whose pictures are compared, bad ones, some that leave, and one that kills workers."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from app.client import ApiError, Client, Generated
from benchmarks.server import Server
from benchmarks.soak.hostile import Row, odd_picture
from benchmarks.soak.wire import exchange, request

BUSY = {"queue_full", "worker_lost", "not_ready"}
"""Honest answers to a good request while workers are killed and the queue is full."""
PATIENCE = 240.0  # seconds for an answer


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
    named["from a CMYK JPEG"] = {"steps": 4, "img2img_enabled": True, "img2img_image": odd_picture()}
    return {name: small | fields for name, fields in named.items()}


class Crowd:
    """answers: what was answered, in words. faults: sentences on what must not be. kills: of workers."""

    def __init__(
        self, server: Server, client: Client, expected: Mapping[str, Generated], rows: Sequence[Row], seed: int = 0
    ) -> None:
        self.server, self.client, self.expected, self.rows = server, client, expected, rows
        self.requests = {name: body for name, body in good_requests().items() if name in expected}
        self.answers: list[str] = []
        self.faults: list[str] = []
        self.kills, self._seeds, self._until = 0, itertools.count(seed * 1000), 0.0

    def besiege(self, seconds: float, killing: bool) -> None:
        """Ask in all ways at once for so long. Afterwards no request is on its way."""
        self._until = time.monotonic() + seconds
        acts = [*[self.ask_well] * 3, self.ask_badly, self.leave, self.ask_later, *([self.kill] if killing else [])]
        with ThreadPoolExecutor(len(acts)) as pool:
            for act in acts:
                pool.submit(self._repeat, act, random.Random(next(self._seeds)))

    def _repeat(self, act: Callable[[random.Random], None], source: random.Random) -> None:
        while time.monotonic() < self._until and self.server.process.poll() is None:
            try:
                act(source)
            except Exception as error:  # noqa: BLE001  # whatever happens to a client is to be told, not to end it
                self._fault(f"{act.__name__}: {type(error).__name__}: {error}")
                time.sleep(1)

    def _fault(self, sentence: str) -> None:
        self.faults.append(sentence[:300])

    def ask(self, name: str) -> None:
        self.judge(name, lambda: self.client.generate(**self.requests[name]))

    def judge(self, name: str, draw: Callable[[], Generated], *allowed: str) -> None:
        """`allowed`: errors that are right besides `BUSY`."""
        try:
            found = draw()
        except ApiError as error:
            self.answers.append(f"good {error.status} {error.type}")
            if error.type not in {*BUSY, *allowed}:
                self._fault(f"{name}: {error.status} {error.type}: {error}")
        else:
            same = found.images == self.expected[name].images
            self.answers.append(f"good 200, {'the quiet' if same else 'not the quiet'} server's bytes")
            if not same:
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
        time.sleep(min(source.uniform(10, 40), max(0.0, self._until - time.monotonic())))
        if time.monotonic() < self._until and (worker := self.server.worker()) is not None:
            with suppress(ProcessLookupError):  # it ended by itself
                os.kill(worker, signal.SIGKILL)
                self.kills += 1

    def ask_later(self, source: random.Random) -> None:
        """As a job: fetched, or cancelled twice at a random moment."""
        name = source.choice(list(self.requests))

        def draw() -> Generated:
            job = self.client.submit(**self.requests[name])
            if source.random() < 0.3:
                time.sleep(source.choice([0.0, 0.1, 0.5]))
                for _ in range(2):
                    try:
                        job.cancel()
                    except ApiError as error:
                        if error.type != "job_finished":
                            raise
                self.answers.append("cancelled twice")
            return job.result()

        self.judge(name, draw, "cancelled")
