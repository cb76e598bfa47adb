"""The local engine over real child processes: what a worker may do to it, and what it does then."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import psutil
import pytest

from app.engine.supervisor import START_FAILURES, LocalEngine
from app.engine.types import DeviceStatus, Job, JobState, WorkerState
from app.errors import (
    Cancelled,
    GenerationFailed,
    Invalid,
    ModelNotFound,
    ModelUnavailable,
    NotReady,
    OutOfMemory,
    QueueFull,
    ServiceError,
    WorkerLost,
)
from cache import DeepCache
from models.base import GenerationParams, Step
from tests.app.fakes import PLAN, STEP_SECONDS, fake_runner, no_runner

LONG = 10_000  # steps that nobody waits for


def job(identity: str, model: str = "fine", steps: int = 3, **more: Any) -> Job:
    """Its picture's colour follows from its identity."""
    seed = zlib.crc32(identity.encode())
    params = GenerationParams(prompt="a", width=64, height=64, steps=steps, seeds=(seed,))
    return Job(id=identity, model=model, params=params, strategy=DeepCache(3, 2), **more)


async def until(condition: Callable[[], bool]) -> None:
    """Polls; the limit only keeps a failing test from hanging."""
    async with asyncio.timeout(60):
        while not condition():  # the engine has no event for what the tests look at
            await asyncio.sleep(0.001)


@asynccontextmanager
async def started(engine: LocalEngine) -> AsyncIterator[LocalEngine]:
    """Ready; stopped at the end."""
    await engine.start()
    try:
        await until(lambda: engine.status().ready)
        yield engine
    finally:
        await engine.stop()


def running(**options: object) -> AbstractAsyncContextManager[LocalEngine]:
    return started(LocalEngine(fake_runner, ["cpu"], backoff=(0.01, 0.1), **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
async def engine(anyio_backend: str) -> AsyncIterator[LocalEngine]:
    async with running(queue_size=3) as engine:
        yield engine


def device(engine: LocalEngine) -> DeviceStatus:
    return engine.status().devices[0]


def pid(engine: LocalEngine) -> int:
    """Of the worker, which must have one."""
    found = device(engine).pid
    assert found is not None
    return found


async def test_a_job_runs_in_another_process_and_tells_of_its_steps(engine: LocalEngine) -> None:
    steps: list[Step] = []
    handle = engine.submit(job("a", steps=5), steps.append)
    result = await handle.result
    assert steps == [Step(index, 5, letter) for index, letter in enumerate("CRRCR")]
    assert result.cache["decisions"] == "CRRCR"
    assert result.images[0].startswith(b"\x89PNG")
    assert handle.state is JobState.DONE
    assert 0 <= handle.queue_seconds <= handle.total_seconds
    assert device(engine).state is WorkerState.READY
    assert pid(engine) != os.getpid()
    assert "fine" in device(engine).loaded
    assert engine.status().plans["fine"] == PLAN


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("raises", GenerationFailed),
        ("hungry", OutOfMemory),
        ("broken", ModelUnavailable),
        ("nowhere", ModelNotFound),
    ],
)
async def test_a_job_that_fails_leaves_the_worker_alive(
    engine: LocalEngine, model: str, error: type[ServiceError]
) -> None:
    worker = pid(engine)
    handle = engine.submit(job("b", model))
    with pytest.raises(error) as caught:
        await handle.result
    assert handle.state is JobState.FAILED
    assert "secret" not in caught.value.message
    assert "lacks its files" not in caught.value.message
    await engine.submit(job("c")).result
    assert pid(engine) == worker


async def test_a_models_own_refusal_names_the_field(engine: LocalEngine) -> None:
    with pytest.raises(Invalid, match="clip_skip can be 1 to 2") as caught:
        await engine.submit(job("f", "misfit")).result
    assert caught.value.field == "clip_skip"


async def test_the_worker_killed_once_the_job_is_done_by_the_next(engine: LocalEngine) -> None:
    first_step = asyncio.Event()
    worker = pid(engine)
    handle = engine.submit(job("d", "slow", steps=20), lambda step: first_step.set())
    waiting = engine.submit(job("e"))
    await first_step.wait()
    os.kill(worker, signal.SIGKILL)
    assert (await handle.result).images
    assert (await waiting.result).images
    assert handle.attempts == 2
    assert pid(engine) != worker
    assert device(engine).restarts >= 1


async def test_a_job_that_kills_its_worker_twice_is_answered_and_the_next_one_runs(engine: LocalEngine) -> None:
    handle = engine.submit(job("f", "dies"))
    waiting = engine.submit(job("g"))
    with pytest.raises(WorkerLost) as caught:
        await handle.result
    assert caught.value.retry_after is not None
    assert handle.attempts == 2
    assert (await waiting.result).images


async def test_an_idle_worker_that_dies_is_replaced_and_leaves_nothing_open(engine: LocalEngine) -> None:
    """Nothing that only a garbage collection would close."""
    gc.collect()
    gc.disable()
    try:
        held = []
        for _ in range(3):
            await until(lambda: engine.status().ready)
            held.append(psutil.Process().num_fds())
            worker = pid(engine)
            os.kill(worker, signal.SIGKILL)
            await until(lambda killed=worker: engine.status().ready and device(engine).pid != killed)
        assert held[2] <= held[1]  # the first worker may find what earlier tests have left, but each dead one left two
    finally:
        gc.enable()
    assert (await engine.submit(job("h")).result).images


async def test_a_cancel_stops_its_job_at_a_step_and_no_other(engine: LocalEngine) -> None:
    seen: list[int] = []
    handle = engine.submit(job("i", "slow", steps=LONG), lambda step: seen.append(step.index))
    following = engine.submit(job("j", "slow", steps=4))
    await until(lambda: bool(seen))
    worker = pid(engine)
    assert engine.cancel("i")
    assert not engine.cancel("i")  # a second time there is nothing to cancel
    with pytest.raises(Cancelled):
        await handle.result
    assert handle.state is JobState.CANCELLED
    assert (await following.result).images
    assert pid(engine) == worker
    assert not engine.cancel("i")
    assert not engine.cancel("j")


async def test_a_cancel_in_the_queue_is_immediate(engine: LocalEngine) -> None:
    running_job = engine.submit(job("k", "slow", steps=LONG))
    queued = engine.submit(job("l"))
    assert engine.cancel("l")
    with pytest.raises(Cancelled):
        await queued.result
    assert queued.started is None
    assert running_job.state is JobState.RUNNING
    engine.cancel("k")
    with pytest.raises(Cancelled):
        await running_job.result


async def test_the_queue_is_bounded_and_in_order(engine: LocalEngine) -> None:
    await until(lambda: device(engine).state is WorkerState.READY)  # a cancelled job has left its worker
    done: list[str] = []
    blocking = engine.submit(job("m", "slow", steps=LONG))
    handles = [engine.submit(job(name)) for name in "nop"]
    for name, handle in zip("nop", handles, strict=True):
        handle.result.add_done_callback(lambda _, name=name: done.append(name))
    assert engine.status().pending == 3
    for refused in (lambda: engine.submit(job("q")), lambda: engine.admit("fine")):
        with pytest.raises(QueueFull) as caught:
            refused()
        assert caught.value.retry_after is not None
    engine.admit("fine", promised=True)
    assert engine.status().pending == 3  # asking queues nothing
    engine.cancel("m")
    await asyncio.gather(blocking.result, *(handle.result for handle in handles), return_exceptions=True)
    assert done == ["n", "o", "p"]
    assert engine.status().pending == 0


async def test_the_event_loop_is_free_while_a_worker_works(engine: LocalEngine) -> None:
    """Ticks of a coroutine during a job: were it blocked for the job's length, there would be next to none."""
    handle = engine.submit(job("r", "slow", steps=20))
    ticks = 0
    while not handle.result.done():
        await asyncio.sleep(STEP_SECONDS / 4)
        ticks += 1
    assert ticks > 5


async def test_two_devices_work_at_the_same_time() -> None:
    engine = LocalEngine(fake_runner, ["cpu", "cpu:1"])
    await engine.start()
    try:
        await until(lambda: all(one.state is WorkerState.READY for one in engine.status().devices))
        handles = [engine.submit(job(name, "slow", steps=LONG)) for name in "ab"]
        assert [handle.state for handle in handles] == [JobState.RUNNING] * 2
        assert engine.status().running == 2
    finally:
        await engine.stop()


async def test_a_worker_that_cannot_start_is_said_to_who_waits_and_who_comes() -> None:
    engine = LocalEngine(no_runner, ["cpu"], backoff=(0.01, 0.01))
    with pytest.raises(NotReady):
        engine.catalogue()
    await engine.start()
    try:
        handle = engine.submit(job("a"))
        with pytest.raises(NotReady):
            await handle.result
        assert device(engine).restarts >= START_FAILURES - 1
        with pytest.raises(NotReady):
            engine.submit(job("b"))
        with pytest.raises(NotReady):
            engine.admit("fine")
        assert not engine.status().ready
    finally:
        await engine.stop()


async def test_stopping_answers_everyone_and_leaves_no_process() -> None:
    async with running(stop_seconds=0.2) as engine:
        worker = psutil.Process(pid(engine))
        hanging = engine.submit(job("a", "hangs"))
        queued = engine.submit(job("b"))
        await until(lambda: hanging.state is JobState.RUNNING)
    for handle in (hanging, queued):
        with pytest.raises(NotReady):
            await handle.result
    assert not worker.is_running()
    with pytest.raises(NotReady):
        engine.submit(job("c"))
    with pytest.raises(NotReady):
        engine.admit("fine")


@pytest.mark.parametrize("pauses", [0, 1, 3, 10])
async def test_stopping_right_after_the_start_leaves_no_process(pauses: int) -> None:
    def workers() -> set[int]:
        return {child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())}

    before = workers()
    engine = LocalEngine(fake_runner, ["cpu"], stop_seconds=5)
    await engine.start()
    for _ in range(pauses):
        await asyncio.sleep(0)
    await engine.stop()
    assert workers() <= before


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_worker_ends_with_its_parent() -> None:
    """A parent that is killed has no chance to stop its worker, even one that hangs in a step."""
    script = """
import asyncio
from app.engine.supervisor import LocalEngine
from tests.app.fakes import fake_runner
from tests.app.test_engine import job
async def main():
    engine = LocalEngine(fake_runner, ["cpu"])
    await engine.start()
    while not engine.status().ready:
        await asyncio.sleep(.01)
    engine.submit(job("a", "hangs"))
    print(engine.status().devices[0].pid, flush=True)
    await asyncio.sleep(3600)
if __name__ == "__main__":
    asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    try:
        assert parent.stdout is not None
        worker = psutil.Process(int(await parent.stdout.readline()))
    finally:
        parent.kill()
        await parent.wait()
    await until(lambda: is_gone(worker))
