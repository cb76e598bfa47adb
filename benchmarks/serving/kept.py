"""What was measured, on disk: the page, the plots and the plan are drawn from it and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

FILE = ROOT / "docs" / "serving.json"
_BULKY = {"points", "looks", "times"}


def read(file: Path) -> dict[str, Any]:
    """Scenarios by name: `conditions`, a sentence, and `entries`, as `scenarios.Measured.as_dict` writes them."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(file: Path, kept: Mapping[str, Any]) -> None:
    """A line an entry, so that a new measurement is a change of its lines alone."""
    parts = []
    for name, one in kept.items():
        entries = ",\n  ".join(json.dumps(entry) for entry in one["entries"])
        head = json.dumps({key: value for key, value in one.items() if key != "entries"})
        parts.append(f' {json.dumps(name)}: {head[:-1]}, "entries": [\n  {entries}\n ]}}')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def setting(entry: Mapping[str, Any]) -> str:
    """An entry's name among those of its load; of a server that is not ours, only what the requests asked."""
    rules = entry["rules"]
    caches = f"caches {'on' if rules['caches'] else 'off'}"
    return f"{caches}, batches of {rules['max_batch']}" if rules["max_batch"] else caches


def summary(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only plots and the plan read."""
    return {
        name: {**one, "entries": [{k: v for k, v in entry.items() if k not in _BULKY} for entry in one["entries"]]}
        for name, one in kept.items()
    }
