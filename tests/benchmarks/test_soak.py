"""The soak's verdict: what it must not let pass."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.client import ApiError, Generated
from benchmarks.soak.__main__ import failures
from benchmarks.soak.clients import Crowd
from benchmarks.soak.hostile import fields, rows
from benchmarks.soak.wire import Answer

WARM = {"resident": 100_000_000, "descriptors": 20, "threads": 9}


def error(status: int, kind: str) -> Answer:
    detail = {"type": kind, "message": "No.", "field": None, "request_id": "x"}
    return Answer(status, {}, json.dumps({"error": detail}).encode())


@pytest.mark.parametrize(
    ("part", "end", "words"),
    [
        ("server", {**WARM, "resident": 105_000_001}, "memory grew by 5.0%"),
        ("worker", {**WARM, "resident": 120_000_000}, "memory grew by 20.0%"),
        ("server", {**WARM, "descriptors": 21}, "descriptors went from 20 to 21"),
        ("worker", {**WARM, "threads": 10}, "threads went from 9 to 10"),
        ("server", {**WARM, "resident": 104_999_999}, None),
        ("server", {"resident": 90_000_000, "descriptors": 19, "threads": 8}, None),
    ],
)
def test_growth_fails(part: str, end: dict[str, int], words: str | None) -> None:
    moments = {name: {"server": WARM, "worker": WARM} for name in ("warm", "worker warm", "end")}
    moments["end"] = {**moments["end"], part: end}
    found = failures(moments, [], alive=True)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0] and part in found[0])


def test_a_server_that_is_gone_fails() -> None:
    moments = {name: {"server": WARM, "worker": WARM} for name in ("warm", "worker warm", "end")}
    assert failures(moments, [], alive=False) == ["the server is gone"]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ((b"one",), False),
        ((b"other",), True),
        ((b"one", b"one"), True),
        ("queue_full", False),
        ("worker_lost", False),
        ("internal", True),
        ("out_of_memory", True),
        ("cancelled", True),
    ],
)
def test_a_good_request_gets_its_picture_or_an_honest_answer(answer: Any, fault: bool) -> None:
    nobody: Any = None
    crowd = Crowd(nobody, nobody, {"uncached": Generated((b"one",), {})}, [])

    def draw() -> Generated:
        if isinstance(answer, str):
            raise ApiError(500, answer, "No.", None, "x")
        return Generated(answer, {})

    crowd.judge("uncached", draw)
    assert bool(crowd.faults) is fault
    crowd.faults.clear()
    crowd.judge("uncached", draw, "cancelled")  # by the client itself
    assert bool(crowd.faults) is (fault and answer != "cancelled")


def test_a_row_takes_its_own_answer_alone() -> None:
    row = fields("width 7", '"width": 7')
    assert row.accepts(error(422, "invalid"))
    assert not row.accepts(error(422, "unsupported"))
    assert not row.accepts(error(500, "internal"))
    assert not row.accepts(Answer(422, {}, b"plain text"))
    assert not row.accepts(None)
    assert len({row.name for row in rows()}) == len(rows()) > 60
