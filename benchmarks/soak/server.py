"""A server process to be treated badly, and what it holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import server
from benchmarks.server import SERVE, Server
from benchmarks.soak.hostile import BODY_LIMIT, BODY_SECONDS

__all__ = ["SERVE", "Held", "Server", "running"]

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


def running(command: Sequence[str] = SERVE, **settings: str) -> AbstractContextManager[Server]:
    """As `benchmarks.server.running`, with bodies bounded low and with LoRAs that must not be read."""
    return server.running(command, _lay_out, **(SETTINGS | settings))


def _lay_out(folder: Path) -> None:
    """LoRAs that must not be read: a pickle, and a link that leads out of the folder."""
    loras = folder / "loras"
    loras.mkdir()
    (loras / "pickle.ckpt").write_bytes(b"\x80\x04.")
    (folder / "outside.safetensors").write_bytes(bytes(16))
    (loras / "link.safetensors").symlink_to(folder / "outside.safetensors")
