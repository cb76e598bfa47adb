"""Pictures are encoded while the worker draws what comes next."""

from __future__ import annotations

import pickle
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from app import images
from app.engine.pipe import Done, Failed
from app.engine.slot import Patience
from app.engine.supervisor import LocalEngine
from app.engine.types import JobHandle, JobState, WorkerState
from tests.app.children import PATIENCE, Nursery
from tests.app.test_engine import device, job, until
from tests.app.test_interleavings import is_right


class Encoder:
    """Stands before the real one: a picture waits until it is let through."""

    def __init__(self) -> None:
        self.waiting = 0
        self._gate = threading.Semaphore(0)
        self._encode = images.encode

    def encode(self, *args: object) -> bytes:
        self.waiting += 1
        assert self._gate.acquire(timeout=PATIENCE)
        self.waiting -= 1
        return self._encode(*args)  # type: ignore[arg-type]

    def open(self, pictures: int = 1000) -> None:
        self._gate.release(pictures)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Encoder]:
    encoder = Encoder()
    monkeypatch.setattr(images, "encode", encoder.encode)
    yield encoder
    encoder.open()


@pytest.fixture
async def engine(nursery: Nursery, encoder: Encoder) -> AsyncIterator[LocalEngine]:
    async with nursery.working(max_batch_size=2) as engine:
        yield engine
        encoder.open()


async def drawn(nursery: Nursery, encoder: Encoder, engine: LocalEngine) -> tuple[JobHandle, JobHandle]:
    """A job whose picture is being encoded, and the next one, whose text is being read."""
    first, second = engine.submit(job("a", steps=1)), engine.submit(job("b", steps=2), lambda step: None)
    nursery.gate.open(3)
    await until(lambda: encoder.waiting == 1 and nursery.gate.at == "text")
    return first, second


async def test_the_next_job_is_drawn_meanwhile(nursery: Nursery, encoder: Encoder, engine: LocalEngine) -> None:
    first, second = await drawn(nursery, encoder, engine)
    assert (first.state, second.state) == (JobState.RUNNING, JobState.RUNNING)
    await nursery.reach("step 1")
    await until(lambda: bool(nursery.child.told("b")))
    assert not first.settled
    encoder.open()
    await first.result
    assert not second.settled
    nursery.gate.open(100)
    await second.result
    assert is_right(first)
    assert is_right(second)
    await until(lambda: device(engine).state is WorkerState.READY)


async def test_no_more_than_one_group_waits_for_the_encoder(
    nursery: Nursery, encoder: Encoder, engine: LocalEngine
) -> None:
    """Pictures take memory: the worker does not run ahead of it."""
    first, second = await drawn(nursery, encoder, engine)
    third = engine.submit(job("c", steps=1))
    nursery.gate.open(100)
    await until(lambda: nursery.gate.passed.count("decode") == 2)
    assert third.state is JobState.QUEUED
    assert device(engine).state is WorkerState.BUSY
    encoder.open()
    for handle in (first, second, third):
        await handle.result


@pytest.mark.parametrize("cancelled", ["a", "b"])
async def test_a_cancel_while_a_picture_is_encoded_hits_its_job_alone(
    nursery: Nursery, encoder: Encoder, engine: LocalEngine, cancelled: str
) -> None:
    first, second = await drawn(nursery, encoder, engine)
    assert engine.cancel(cancelled)
    nursery.gate.open(100)
    encoder.open()
    stays, goes = (second, first) if cancelled == "a" else (first, second)
    await stays.result
    assert is_right(stays)
    assert goes.state is JobState.CANCELLED
    assert (await engine.submit(job("c", steps=1)).result).images


async def test_pictures_of_a_group_that_nobody_waits_for_are_not_encoded(
    nursery: Nursery, encoder: Encoder, engine: LocalEngine
) -> None:
    blocking = engine.submit(job("first", steps=1))
    group = [engine.submit(job(name, steps=3)) for name in "ab"]
    nursery.gate.open(3)
    await until(lambda: encoder.waiting == 1 and nursery.gate.at == "text")
    nursery.gate.open(5)  # the whole group
    await until(lambda: nursery.gate.passed.count("decode") == 2)
    engine.submit(job("next", steps=1))
    assert engine.cancel("b")
    await until(nursery.child.has_orders)
    encoder.open(1)  # the first one's
    await blocking.result
    await until(lambda: nursery.gate.at == "text")  # of the next one: so it has obeyed what came before that
    encoder.open()
    await group[0].result
    nursery.child.wait_sent(Failed, "b")
    assert not any(isinstance(one, Done) and one.job_id == "b" for one in nursery.child.sent)


async def test_a_worker_lost_while_it_encodes_costs_no_job(
    nursery: Nursery, encoder: Encoder, engine: LocalEngine
) -> None:
    first, second = await drawn(nursery, encoder, engine)
    nursery.child.kill()
    await until(lambda: len(nursery.children) == 2 and nursery.gate.at == "text")
    assert (first.state, second.state) == (JobState.RUNNING, JobState.QUEUED)
    encoder.open()
    nursery.gate.open(100)
    await second.result
    assert (first.attempts, second.attempts) == (2, 2)
    assert is_right(first)
    assert is_right(second)


async def test_an_encoder_that_hangs_is_a_job_that_stalls(nursery: Nursery, encoder: Encoder) -> None:
    async with nursery.working(patience=Patience(stall=0.2)) as engine:
        handle = engine.submit(job("a", steps=1))
        nursery.gate.open(3)
        await until(lambda: len(nursery.children) == 2 and nursery.gate.at == "text")
        assert handle.attempts == 2
        encoder.open()
        nursery.gate.open(100)
        await handle.result


async def test_an_end_before_the_drawing_is_over_is_nonsense(
    nursery: Nursery, encoder: Encoder, engine: LocalEngine
) -> None:
    encoder.open()
    first = engine.submit(job("a", steps=1))
    nursery.gate.open(3)
    await first.result
    nursery.child.wait_sent(Done, "a")
    [done] = [report for report in nursery.child.sent if isinstance(report, Done)]
    second = engine.submit(job("b", steps=1))
    await until(lambda: nursery.gate.at == "text")
    nursery.child.speak(pickle.dumps(Done("b", done.result)))
    await until(lambda: len(nursery.children) == 2 and nursery.gate.at == "text")
    nursery.gate.open(100)
    await second.result
    assert is_right(second)
