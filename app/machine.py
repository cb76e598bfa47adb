"""The machine: what a time was measured on, without which no time is worth showing, and how its cores are shared."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SPINS = "30000"


def share_cores() -> None:
    """Let this process's idle threads give up their cores soon. To be called before torch is imported.

    At the end of each parallel loop, thousands in a picture, GNU's OpenMP, which torch computes with on Linux, lets the
    threads that are done spin for the last one, 300 000 rounds. Where another program wants the cores the last one
    waits for them (docs/decisions/spinning-threads.md). What the operator says in OpenMP's own variables stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def processor() -> str:
    """The CPU's name; Linux keeps it where `platform` does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of each distribution, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
