"""Finished measurements on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cache.measure import Result
from benchmarks.report import ROOT

_MEASURED_CODE = ("cache/*.py", "models/*.py", "benchmarks/cache/peers.py", "benchmarks/cache/measure.py")


def fingerprint(conditions: Mapping[str, Any], weights: Path) -> str:
    """Changes with the conditions, the code that is measured or measures, and the model's files."""
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True, default=str).encode())
    code = sorted(file for pattern in _MEASURED_CODE for file in ROOT.glob(pattern))
    for file in (*code, *sorted(file for file in weights.rglob("*") if file.is_file())):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """One JSON line a measurement in `file`; a setting's last one counts, those of another fingerprint are not read."""

    def __init__(self, file: Path, mark: str) -> None:
        self.file, self.mark = file, mark
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found = [Result(**entry["result"]) for entry in map(json.loads, lines) if entry["mark"] == mark]
        self.results = {result.name: result for result in found}

    def add(self, result: Result) -> None:
        self.results[result.name] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"mark": self.mark, "result": asdict(result)}) + "\n")
