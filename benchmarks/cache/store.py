"""Finished measurements on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cache.measure import Result
from benchmarks.machine import ROOT

_MEASURED_CODE = ("cache/*.py", "models/*.py", "benchmarks/cache/peers.py", "benchmarks/cache/measure.py")


def fingerprint(conditions: Mapping[str, Any], weights: Path) -> str:
    """Changes with the conditions, the code that is measured or measures, and the model's files."""
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True, default=str).encode())
    code = sorted(file for pattern in _MEASURED_CODE for file in ROOT.glob(pattern))
    for file in (*code, *_files(weights)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


class Store:
    """One JSON line a measurement in `file`; a setting's last one counts, those of another fingerprint are not read."""

    def __init__(self, file: Path, mark: str) -> None:
        self.file = file
        self.mark = mark
        self.results: dict[str, Result] = {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if entry["mark"] == mark:
                    result = Result(**entry["result"])
                    self.results[result.name] = result

    def add(self, result: Result) -> None:
        self.results[result.name] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"mark": self.mark, "result": result.as_dict()}) + "\n")
