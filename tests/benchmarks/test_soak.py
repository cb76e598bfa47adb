"""The soak's verdict: what it must not let pass."""

from __future__ import annotations

import base64
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from benchmarks.soak.__main__ import failures
from benchmarks.soak.clients import Crowd
from benchmarks.soak.hostile import fields, rows
from benchmarks.soak.wire import Answer

WARM = {"resident": 100_000_000, "descriptors": 20, "threads": 9}


def picture(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 100, 100)).save(file, "png")
    return file.getvalue()


def crowd() -> Crowd:
    server: Any = SimpleNamespace(address=("127.0.0.1", 1))
    return Crowd(server, {"uncached": (picture(100),)}, [], seed=0)


def drawn(*pictures: bytes) -> Answer:
    texts = [base64.b64encode(one).decode() for one in pictures]
    return answered(200, {"image": texts[0]} if len(texts) == 1 else {"images": texts})


def answered(status: int, body: object) -> Answer:
    return Answer(status, {}, json.dumps(body).encode())


def error(status: int, kind: str) -> Answer:
    detail = {"type": kind, "message": "No.", "field": None, "request_id": "x"}
    return answered(status, {"error": detail})


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
        (drawn(picture(100)), False),
        (drawn(picture(101)), True),
        (drawn(picture(100) + b"other bytes"), True),
        (drawn(picture(100), picture(100)), True),
        (error(429, "queue_full"), False),
        (error(503, "worker_lost"), False),
        (error(500, "internal"), True),
        (error(503, "out_of_memory"), True),
        (None, True),
    ],
)
def test_a_good_request_gets_its_picture_or_an_honest_answer(answer: Answer | None, fault: bool) -> None:
    judge = crowd()
    judge.judge("uncached", answer)
    assert bool(judge.faults) is fault


def test_a_row_takes_its_own_answer_alone() -> None:
    row = fields("width 7", '"width": 7')
    assert row.accepts(error(422, "invalid"))
    assert not row.accepts(error(422, "unsupported"))
    assert not row.accepts(error(500, "internal"))
    assert not row.accepts(Answer(422, {}, b"plain text"))
    assert not row.accepts(None)
    assert len({row.name for row in rows()}) == len(rows()) > 90
