"""A server process to be treated badly, and what it holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.soak.hostile import BODY_LIMIT, BODY_SECONDS
from benchmarks.soak.wire import wait_for

_ROOT = Path(__file__).resolve().parents[2]
SERVE = ("-m", "app", "serve", "--port", "0")
SETTINGS = {
    "WAVESPEED_DEVICE": "cpu",
    "WAVESPEED_MAX_BODY_BYTES": str(BODY_LIMIT),
    "WAVESPEED_BODY_SECONDS": str(BODY_SECONDS),
}


@dataclass(frozen=True, slots=True)
class Held:
    """By a process at one moment. `resident`: bytes."""

    resident: int
    descriptors: int
    threads: int

    @classmethod
    def settled(cls, pid: int, seconds: float = 3.0) -> Held:
        """The least of each over some seconds: a connection that is being closed is not held."""
        seen = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            seen.append(cls.of(pid))
            time.sleep(0.1)
        return cls(*(min(getattr(held, part) for held in seen) for part in ("resident", "descriptors", "threads")))

    @classmethod
    def of(cls, pid: int) -> Held:
        process = psutil.Process(pid)
        with process.oneshot():
            return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


@dataclass(frozen=True, slots=True)
class Server:
    process: subprocess.Popen[bytes]
    address: tuple[str, int]
    folder: Path

    def get(self, path: str) -> httpx.Response:
        host, port = self.address
        return httpx.get(f"http://{host}:{port}{path}", timeout=30)

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
def running(command: Sequence[str] = SERVE, **settings: str) -> Iterator[Server]:
    """`python` with the arguments `command`, which must serve as `app serve` does; ready to take jobs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WAVESPEED_", "LD_"))}
    with tempfile.TemporaryDirectory(prefix="wavespeed-") as name:
        folder = Path(name)
        _lay_out(folder)
        environment = kept | {"PYTHONPATH": str(_ROOT)} | SETTINGS | settings
        with (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stderr=stderr)
        try:
            yield _ready(process, folder)
        finally:
            process.kill()
            process.wait()


def _lay_out(folder: Path) -> None:
    """LoRAs that must not be read: a pickle, and a link that leads out of the folder."""
    loras = folder / "loras"
    loras.mkdir()
    (loras / "pickle.ckpt").write_bytes(b"\x80\x04.")
    (folder / "outside.safetensors").write_bytes(bytes(16))
    (loras / "link.safetensors").symlink_to(folder / "outside.safetensors")


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
