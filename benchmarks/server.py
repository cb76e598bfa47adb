"""A server process of a benchmark's own: on a free port, in a folder that goes away with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.report import ROOT

SERVE = ("-m", "app", "serve", "--port", "0")


@dataclass(frozen=True, slots=True)
class Server:
    process: subprocess.Popen[bytes]
    address: tuple[str, int]
    folder: Path

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    def client(self) -> httpx.Client:
        """One that waits for long answers."""
        return httpx.Client(base_url=self.url, timeout=600)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=30)

    def worker(self) -> int | None:
        """The process id of the worker, when it is ready."""
        device = self.get("/api/telemetry").json()["devices"][0]
        return device["pid"] if device["state"] in ("ready", "busy") else None

    def idle(self) -> bool:
        seen = self.get("/api/telemetry").json()
        return bool(seen["worker_running"]) and not seen["pending_count"] + seen["running_count"]

    @property
    def log(self) -> str:
        return (self.folder / "logs" / "server.log").read_text(encoding="utf-8")


@contextmanager
def running(
    command: Sequence[str] = SERVE, prepare: Callable[[Path], None] | None = None, **settings: str
) -> Iterator[Server]:
    """`python` with the arguments `command`, which must serve as `app serve` does; ready to take jobs.

    `prepare` lays out the folder that it runs in; `settings` are its environment variables, and no other `WAVESPEED_*`
    or `LD_*` of ours reaches it. What is asked for twice is drawn twice, and there is no page.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WAVESPEED_", "LD_"))}
    with tempfile.TemporaryDirectory(prefix="wavespeed-") as name:
        folder = Path(name)
        if prepare is not None:
            prepare(folder)
        ours = {"PYTHONPATH": str(ROOT), "WAVESPEED_RESUME_BYTES": "0", "WAVESPEED_PAGE": "false"}
        environment = kept | ours | settings
        with (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stderr=stderr)
        try:
            yield _ready(process, folder)
        finally:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], folder: Path) -> Server:
    def listening() -> re.Match[str] | None:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {(folder / 'stderr').read_text()[-2000:]}")
        log = folder / "logs" / "server.log"
        return re.search(r"http://(127\.0\.0\.1):(\d+)", log.read_text()) if log.exists() else None

    found = wait_for(listening, 120, "the server's address")
    server = Server(process, (found[1], int(found[2])), folder)
    wait_for(lambda: server.get("/readyz").status_code == 200, 180, "readiness")
    return server


def wait_for(found: object, seconds: float, what: str) -> object:
    """Poll the callable `found` until it returns something true. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (result := found()):  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds:g} seconds")
        time.sleep(0.05)
    return result
