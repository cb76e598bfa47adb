"""What every benchmark says of its figures: of which machine, how sure, in tables, and in one JSON line, the last."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from app.cli.compare import processor, versions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "DeepCache", "cache-dit")
RESAMPLES, COVERAGE = 10_000, 0.95
_VERDICT = {True: "holds", False: "**does not hold**", None: "–"}


def commit() -> str:
    """The checkout's commit, with a + if tracked files differ from it; "unknown" outside of a checkout."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and commit, ready for JSON: without them no figure is worth printing."""
    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": commit(),
    }


def named(packages: Mapping[str, str | None]) -> str:
    """Those that are installed, with their versions, as a page says it."""
    return ", ".join(f"{name} {number}" for name, number in packages.items() if number)


@dataclass(frozen=True, slots=True)
class Claim:
    """What is demanded, the figures, and whether it holds: None for a figure that nothing was demanded of."""

    sentence: str
    measured: str
    holds: bool | None = None


def judged(claims: Iterable[Claim]) -> list[str]:
    return markdown(" | measured | ", (f"{one.sentence} | {one.measured} | {_VERDICT[one.holds]}" for one in claims))


def markdown(columns: str, rows: Iterable[str]) -> list[str]:
    """Lines of a table, an empty one last. Cells are separated by " | "."""
    head = f"| {columns} |".replace("  ", " ")
    return [head, "|---" * (columns.count(" | ") + 1) + "|", *(f"| {row} |" for row in rows), ""]


def show(title: str, columns: str, rows: Iterable[str]) -> None:
    """The same on the terminal: names to the left, figures to the right."""
    shown = Table(title=title)
    for number, column in enumerate(columns.split(" | ")):
        shown.add_column(column, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row.split(" | "))
    Console(width=200).print(shown)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean: percentile bootstrap with a fixed seed.

    Given the differences of two settings on the same pictures, it is that of their mean difference.
    """
    sample = np.asarray(values, float)
    drawn = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(sample[drawn].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least `share` of them do not exceed: a measured one, never one in between."""
    return float(np.percentile(values, 100 * share, method="inverted_cdf")) if values else float("nan")


def save(figure: Any, file: Path) -> None:
    """A figure of matplotlib as PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
