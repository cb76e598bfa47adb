"""Orders and reports that cross each other, with a worker that does one thing at a time on the test's word."""

from __future__ import annotations

import asyncio
import pickle
import random
from collections.abc import AsyncIterator

import pytest

from app.engine.pipe import Alive, Done, Loaded
from app.engine.slot import Patience
from app.engine.supervisor import LocalEngine
from app.engine.types import JobHandle, JobState, WorkerState
from app.errors import Cancelled, DeadlineExceeded, ModelUnavailable, NotReady, WorkerLost
from tests.app.children import Nursery
from tests.app.fakes import fake_runner
from tests.app.test_engine import device, job, until

INTERLEAVINGS = 1000


@pytest.fixture
async def engine(nursery: Nursery) -> AsyncIterator[LocalEngine]:
    async with nursery.working() as engine:
        yield engine


def is_right(handle: JobHandle) -> bool:
    """The pictures are those of this very job, drawn here by the same fake without an engine."""
    return handle.result.result().images == fake_runner("cpu").run(handle.job, lambda step: None).images


async def free(engine: LocalEngine) -> None:
    await until(lambda: device(engine).state is WorkerState.READY)


async def test_a_cancel_hits_its_job_or_nothing_in_a_thousand_interleavings(
    nursery: Nursery, engine: LocalEngine
) -> None:
    """The first job is cancelled at some point of its life, the last two being: its result is in the pipe, and is read.

    In half of them the worker has got exactly so far; in the others it runs on while the cancel is on its way.
    """
    chance = random.Random(5)
    points = ("text", "step 0", "step 1", "decode", "sent", "read")
    ends = {"cancelled by the worker": 0, "done too late": 0, "done": 0}
    for number in range(INTERLEAVINGS):
        first, second = engine.submit(job(f"{number}a", steps=2)), engine.submit(job(f"{number}b", steps=1))
        point = chance.choice(points)
        races = chance.random() < 0.5 and point != "read"
        if not races:
            await until(lambda: nursery.gate.at == "text")
        nursery.gate.open(points.index(point))
        if point == "read":
            await first.result
        elif point == "sent" and not races:
            nursery.child.wait_sent(Done, first.job.id)  # blocks the event loop: the engine cannot have read it
        elif not races:
            await until(lambda point=point: nursery.gate.at == point)
        assert engine.cancel(first.job.id) is (point != "read")
        nursery.gate.open(100)
        result = await second.result
        nursery.gate.close()
        assert is_right(second)
        assert result.cache["decisions"] == "C"
        if point == "read":
            assert is_right(first)
            ends["done"] += 1
        else:
            assert first.state is JobState.CANCELLED
            done = any(isinstance(report, Done) and report.job_id == first.job.id for report in nursery.child.sent)
            ends["done too late" if done else "cancelled by the worker"] += 1
        nursery.child.sent.clear()
    assert min(ends.values()) > INTERLEAVINGS / 20, ends
    assert len(nursery.children) == 1


@pytest.mark.parametrize("stage", ["load", "text", "step 0", "step 3", "decode"])
async def test_a_cancel_frees_the_worker_within_one_step(nursery: Nursery, engine: LocalEngine, stage: str) -> None:
    model = "slow" if stage == "load" else "fine"
    cancelled = engine.submit(job("a", model, steps=5))
    following = engine.submit(job("b", steps=1))
    await nursery.reach(stage)
    assert engine.cancel("a")
    assert cancelled.state is JobState.CANCELLED
    await until(nursery.child.has_orders)
    done_before = len(nursery.gate.passed)
    nursery.gate.open(100)
    await following.result
    passed = nursery.gate.passed[done_before:]
    mine = passed[: len(passed) - 3]  # the last three are the following job's text, step and decode
    assert sum(thing.startswith("step") for thing in mine) <= 1
    assert [thing for thing in mine if thing == "decode"] == (["decode"] if stage == "decode" else [])


async def test_a_job_whose_worker_dies_is_done_once_and_keeps_its_age(nursery: Nursery, engine: LocalEngine) -> None:
    first, second = engine.submit(job("a", steps=3)), engine.submit(job("b", steps=1))
    await until(lambda: nursery.gate.at == "text")
    assert (first.place, second.place) == (None, 1)
    nursery.child.kill()
    await until(lambda: len(nursery.children) == 2 and nursery.gate.at == "text")
    assert (first.state, first.attempts, second.place) == (JobState.RUNNING, 2, 1)
    nursery.gate.open(100)
    await second.result
    assert is_right(first)
    assert is_right(second)


async def test_a_job_that_loses_two_workers_is_answered(nursery: Nursery, engine: LocalEngine) -> None:
    handle = engine.submit(job("a"))
    for worker in (1, 2):
        await until(lambda worker=worker: len(nursery.children) == worker and nursery.gate.at == "text")
        nursery.child.kill()
    with pytest.raises(WorkerLost, match="memory"):
        await handle.result


async def test_a_cancelled_job_is_not_tried_again(nursery: Nursery, engine: LocalEngine) -> None:
    handle, following = engine.submit(job("a")), engine.submit(job("b"))
    await until(lambda: nursery.gate.at == "text")
    engine.cancel("a")
    nursery.child.kill()
    await until(lambda: len(nursery.children) == 2 and nursery.gate.at == "text")
    nursery.gate.open(100)
    await following.result
    with pytest.raises(Cancelled):
        handle.result.result()
    assert handle.attempts == 1


@pytest.mark.parametrize("where", ["waited", "ran"])
async def test_a_deadline_is_kept_wherever_the_job_is(nursery: Nursery, engine: LocalEngine, where: str) -> None:
    late = job("a", steps=3, deadline_seconds=0.05)
    if where == "waited":
        blocking = engine.submit(job("b"))
        handle = engine.submit(late, lambda step: None)
    else:
        handle, blocking = engine.submit(late, lambda step: None), None
    with pytest.raises(DeadlineExceeded, match=where):
        await handle.result
    if where == "ran":
        await until(nursery.child.has_orders)  # the cancel has reached the worker, which is at a step still
    nursery.gate.open(1000)
    following = engine.submit(job("c"))
    await following.result
    assert len(nursery.child.told("a")) <= 1
    assert blocking is None or is_right(blocking)


async def test_a_model_that_kills_its_workers_at_load_is_held_and_said(nursery: Nursery) -> None:
    async with nursery.working(quarantine_seconds=1.0) as engine:
        handle, waiting = engine.submit(job("a", "slow")), engine.submit(job("b", "slow"))
        for worker in (1, 2):
            await until(lambda worker=worker: len(nursery.children) == worker and nursery.gate.at == "load")
            await until(lambda: device(engine).loading == "slow")  # said before it is begun, and heard after
            nursery.child.kill()
        for one in (handle, waiting):
            with pytest.raises(ModelUnavailable, match="twice in a row"):
                await one.result
        assert list(engine.status().quarantined) == ["slow"]
        with pytest.raises(ModelUnavailable):
            engine.submit(job("c", "slow"))
        with pytest.raises(ModelUnavailable):
            engine.admit("slow")
        engine.admit("fine")
        await until(lambda: engine.status().ready)
        nursery.gate.open(100)
        assert (await engine.submit(job("d")).result).images  # other models are served
        await until(lambda: not engine.status().quarantined)
        assert (await engine.submit(job("e", "slow")).result).images


async def test_a_load_is_given_its_own_time(nursery: Nursery) -> None:
    """Neither steps nor readiness can be asked of a worker that loads; signs of life can, and it gives them."""
    async with nursery.working(patience=Patience(silence=1.0, stall=1.0, load=60)) as engine:
        handle = engine.submit(job("a", "slow"))
        await nursery.reach("load")
        await until(lambda: sum(isinstance(report, Alive) for report in nursery.child.sent) >= 9)  # 6 a second: 1.5 s
        nursery.gate.open(100)
        assert (await handle.result).images
        assert len(nursery.children) == 1


async def test_a_load_that_does_not_end_is_given_up(nursery: Nursery) -> None:
    async with nursery.working(patience=Patience(load=0.1)) as engine:
        handle = engine.submit(job("a", "slow"))
        with pytest.raises(ModelUnavailable, match="loading slow took too long"):
            await handle.result
        assert handle.attempts == 2


@pytest.mark.parametrize("words", [b"garbage", pickle.dumps("a picture"), pickle.dumps(Loaded)])
async def test_a_worker_that_talks_nonsense_is_replaced(nursery: Nursery, engine: LocalEngine, words: bytes) -> None:
    handle = engine.submit(job("a"))
    await nursery.reach("step 1")
    nursery.child.speak(words)
    await until(lambda: len(nursery.children) == 2 and nursery.gate.at is not None)
    nursery.gate.open(100)
    await handle.result
    assert is_right(handle)


async def test_the_end_of_another_job_is_never_taken_for_this_ones(nursery: Nursery, engine: LocalEngine) -> None:
    first = engine.submit(job("a"))
    nursery.gate.open(100)
    await first.result
    nursery.gate.close()
    nursery.child.wait_sent(Done, "a")
    [done] = [report for report in nursery.child.sent if isinstance(report, Done)]
    second = engine.submit(job("b"))
    await nursery.reach("step 1")
    nursery.child.speak(pickle.dumps(done))
    await until(lambda: len(nursery.children) == 2 and nursery.gate.at is not None)
    nursery.gate.open(100)
    await second.result
    assert is_right(second)


async def test_draining_finishes_what_was_accepted_and_refuses_the_rest(nursery: Nursery, engine: LocalEngine) -> None:
    running, waiting = engine.submit(job("a")), engine.submit(job("b"))
    draining = asyncio.create_task(engine.drain(60))
    await until(lambda: engine.status().draining)
    assert not engine.status().ready
    assert device(engine).state is WorkerState.DRAINING
    with pytest.raises(NotReady):
        engine.submit(job("c"))
    nursery.gate.open(100)
    await draining
    assert is_right(running)
    assert is_right(waiting)


async def test_draining_answers_what_it_cannot_finish(nursery: Nursery, engine: LocalEngine) -> None:
    running, waiting = engine.submit(job("a")), engine.submit(job("b"))
    await until(lambda: nursery.gate.at == "text")
    await engine.drain(0.01)
    for handle in (running, waiting):
        with pytest.raises(NotReady) as caught:
            handle.result.result()
        assert caught.value.retry_after
    nursery.gate.open(100)
