"""docs/operations.md says what the service does."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import get_args

import pytest

import app.errors
from app.engine.types import WORKER_MOVES, WorkerState
from app.errors import ServiceError
from app.http.schemas import parse
from app.jobs.record import EventName
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def first_cells(after: str) -> list[list[str]]:
    table = re.search(r"((?:^\|.*\n)+)", TEXT[TEXT.index(after) :], re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()[2:]]


def test_the_states_and_their_order_are_the_tables() -> None:
    rows = {state.strip("`"): re.findall(r"`(\w+)`", before) for state, _, before in first_cells("## Workers")}
    assert set(rows) == set(WorkerState)
    rows["failed"] = [state for state in WorkerState if state is not WorkerState.FAILED]
    for state, before in rows.items():
        assert set(before) == {old for old, allowed in WORKER_MOVES.items() if state in allowed}, state


def test_the_events_are_those_sent() -> None:
    assert [name.strip("`") for name, _ in first_cells("The events, each with an id")] == list(get_args(EventName))


def test_the_alerts_and_the_recorded_series_are_those_of_the_rules() -> None:
    rules = {}
    for name in ("alert", "record"):
        files = [path.read_text(encoding="utf-8") for path in sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))]
        rules[name] = [found for file in files for found in re.findall(rf"- {name}: (\S+)", file)]
    assert sorted(row[0].strip("`") for row in first_cells("### Alerts")) == sorted(rules["alert"])
    assert sorted(row[0].strip("`") for row in first_cells("| recorded |")) == sorted(rules["record"])


def test_settings_and_error_types_exist() -> None:
    settings = {f"WAVESPEED_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"WAVESPEED_[A-Z]+(?:_[A-Z]+)*", TEXT)) <= settings
    types = {error.type: error.status for error in vars(app.errors).values() if is_error(error)}
    for status, kind in re.findall(r"(\d{3}) `([a-z_]+)`", TEXT):
        assert types[kind] == int(status), kind


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, ServiceError)


@pytest.mark.parametrize("block", BLOCKS)
def test_commands_parse_and_send_what_is_taken(block: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    for body in re.findall(r"-d '(\{.*?\})'", block, re.DOTALL):
        parse(json.loads(body))
