"""A server process to be treated badly, and what a process holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks import server
from benchmarks.server import SERVE, Server
from benchmarks.soak.hostile import BODY_LIMIT, BODY_SECONDS

SETTINGS = {
    "WAVESPEED_DEVICE": "cpu",
    "WAVESPEED_MAX_BODY_BYTES": str(BODY_LIMIT),
    "WAVESPEED_BODY_SECONDS": str(BODY_SECONDS),
}


class Held(NamedTuple):
    """By a process at one moment. `resident`: bytes."""

    resident: int
    descriptors: int
    threads: int

    def __str__(self) -> str:
        return f"{self.resident / 1e6:.1f} | {self.descriptors} | {self.threads}"

    @classmethod
    def settled(cls, pid: int, seconds: float = 3.0) -> Held:
        """The least of each over some seconds: a connection that is being closed is not held."""
        process, seen, until = psutil.Process(pid), [], time.monotonic() + seconds
        while time.monotonic() < until:
            with process.oneshot():
                seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
            time.sleep(0.1)
        return cls(*map(min, zip(*seen, strict=True)))


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
