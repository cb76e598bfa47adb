"""What every benchmark says of its figures: of which machine, how sure, in tables, and in one JSON line, the last."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.cli.compare import versions
from models.tuning.profile import processor

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "DeepCache", "cache-dit", "locust")
_VERDICT = {True: "holds", False: "**does not hold**", None: "–"}


def commit() -> str:
    """The checkout's commit, with a + if tracked files differ from it; "unknown" outside of a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and commit, ready for JSON: without them no figure is worth printing."""
    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": commit(),
    }


def conditions(of: Mapping[str, Any]) -> str:
    """The same in a sentence."""
    packages = ", ".join(f"{name} {number}" for name, number in of["versions"].items() if number)
    return "{device}, {cores} cores. Python {python}, ".format(**of) + f"{packages}. Commit {of['commit']}."


@dataclass(frozen=True, slots=True)
class Claim:
    """What is demanded, the figures, and whether it holds: None for a figure that nothing was demanded of."""

    sentence: str
    measured: str
    holds: bool | None = None


def judged(claims: Iterable[Claim]) -> list[str]:
    return table(" | measured | ", (f"{one.sentence} | {one.measured} | {_VERDICT[one.holds]}" for one in claims))


def table(columns: str, rows: Iterable[str]) -> list[str]:
    """Lines of Markdown, an empty one last. Cells are separated by " | "."""
    head = f"| {columns} |".replace("  ", " ")
    return [head, "|---" * (columns.count(" | ") + 1) + "|", *(f"| {row} |" for row in rows), ""]


def show(lines: Iterable[str]) -> None:
    print(*lines, sep="\n", flush=True)


def fill(page: Path, parts: Mapping[str, Iterable[str]]) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`. Raises ValueError where a page lacks them."""
    text = page.read_text(encoding="utf-8")
    for name, lines in parts.items():
        between, new = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", "\n".join(["", *lines])
        text, found = re.subn(between, lambda at, new=new: at[1] + new + at[2], text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"the page marks the place of {name!r} {found} times")
    page.write_text(text, encoding="utf-8")


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least `share` of them do not exceed: a measured one, never one in between."""
    return float(np.percentile(values, 100 * share, method="inverted_cdf")) if values else float("nan")


def save(figure: Any, file: Path) -> None:
    """A figure of matplotlib as PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
