"""A step that nobody waits to hear of wakes nobody: what crosses the pipe is counted here, not timed."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from app.engine import slot
from app.engine.pipe import Alive, Done, Progress
from app.engine.slot import Patience, Slot
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import fake_runner
from tests.app.test_engine import device, job, until

STEPS = 40
BODY = {"prompt": "a", "width": 64, "height": 64, "steps": STEPS}


async def test_a_request_that_waits_for_its_picture_has_no_step_told(nursery: Nursery) -> None:
    engine = nursery.engine()
    began = time.monotonic()
    async with client_of(engine) as client:
        await until(lambda: engine.status().ready)
        nursery.gate.open(1000)
        answer = (await client.post("/api/generate", json=BODY)).json()
        assert answer["cache"]["computed"] == STEPS
        nursery.child.wait_sent(Done, answer["request_id"])  # it is noted after it was sent
        reports = [report for report in nursery.child.sent if not isinstance(report, Alive)]
    signs = [report for report in reports if isinstance(report, Progress)]
    assert all(not sign.steps for sign in signs)
    assert len(signs) <= (time.monotonic() - began) / Patience().heartbeat  # none, but for a machine that stood still
    assert sum(isinstance(report, Done) for report in reports) == 1


async def test_a_job_whose_steps_can_be_watched_has_each_told(nursery: Nursery) -> None:
    engine = nursery.engine()
    async with client_of(engine) as client:
        await until(lambda: engine.status().ready)
        nursery.gate.open(1000)
        name = (await client.post("/api/jobs", json=BODY)).json()["id"]
        await until(lambda: any(isinstance(report, Done) for report in nursery.child.sent))
        assert [step.index for step in nursery.child.told(name)] == list(range(STEPS))


async def test_of_a_group_those_who_listen_are_told(nursery: Nursery) -> None:
    async with nursery.working(max_batch_size=4) as engine:
        first = engine.submit(job("first", steps=1))
        heard: list[Any] = []
        silent, listening = engine.submit(job("a")), engine.submit(job("b"), heard.append)
        nursery.gate.open(1000)
        results = await asyncio.gather(first.result, silent.result, listening.result)
        assert [result.batches for result in results] == [(1,), (2,), ()]
        assert nursery.child.told("a") == []
        assert nursery.child.told("b") == heard
        assert len(heard) == 3


async def test_progress_that_nobody_hears_is_still_signed_now_and_then(nursery: Nursery) -> None:
    """Else a long job would look like one that stalls."""
    patience = Patience(silence=3.0, stall=600)
    async with nursery.working(patience=patience) as engine:
        handle = engine.submit(job("a", steps=2))
        await nursery.reach("step 0")
        beats = sum(isinstance(report, Alive) for report in nursery.child.sent)
        await until(lambda: sum(isinstance(report, Alive) for report in nursery.child.sent) >= beats + 2)
        nursery.gate.open()  # more than a heartbeat has passed since the job began
        await until(lambda: nursery.gate.at == "step 1")
        assert Progress({}) in nursery.child.sent
        nursery.gate.open(1000)
        assert (await handle.result).images == fake_runner("cpu").run(handle.job, lambda step: None).images
        assert device(engine).restarts == 0


def test_a_step_may_take_as_long_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since the last sign: steps for as long as a heartbeat, untold, and one that takes just as long as it may."""
    now = 1000.0
    monkeypatch.setattr(slot, "time", SimpleNamespace(monotonic=lambda: now))
    patience = Patience(silence=60, stall=12)
    assert patience.heartbeat == 2
    busy: Any = Slot("cpu")
    busy.process = SimpleNamespace(silent_seconds=0.0, deaf_seconds=0.0, delivered=now)
    busy.up, busy.running = True, [object()]
    now += 14
    assert busy.overdue(patience) is None
    now += 0.1
    assert busy.overdue(patience) == "its job finished no step"
