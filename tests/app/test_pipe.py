"""Orders to a worker: they wait for nobody else's work, and what they weigh is not held against the worker."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest
from PIL import Image

from app.engine.pipe import Alive, Done, Known, Plan, Ready, Run, Stop, WorkerProcess
from app.engine.slot import Patience
from app.engine.supervisor import LocalEngine
from app.engine.types import Job, JobResult, JobState, WorkerState
from app.engine.worker import RunnerFactory, _Line
from app.errors import ServiceError, WorkerLost
from models.base import Img2Img, Timings
from tests.app.children import Nursery, ThreadChild
from tests.app.fakes import fake_runner
from tests.app.test_engine import device, job, pid, running, until

STALL = 1.0


def painted_over(identity: str, side: int, model: str = "fine", steps: int = 3) -> Job:
    """A job with a picture of `side` squared pixels, three bytes each."""
    plain = job(identity, model, steps)
    picture = Img2Img(picture=Image.new("RGB", (side, side), "green"))
    return replace(plain, params=replace(plain.params, img2img=picture))


@pytest.fixture
async def busy_pool() -> AsyncIterator[None]:
    """No thread of the event loop's own is free."""
    over = threading.Event()
    pool = ThreadPoolExecutor(2)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(pool)
    for _ in range(50):
        loop.run_in_executor(None, over.wait)
    yield
    over.set()
    pool.shutdown()
    loop.set_default_executor(ThreadPoolExecutor())


async def test_other_peoples_uploads_keep_no_order_from_a_worker(busy_pool: None) -> None:
    """Start, orders, cancel, the replacement of a lost worker and the end: with the loop's pool full, all of it."""
    async with asyncio.timeout(60), running(stop_seconds=0.0, patience=Patience(stall=STALL)) as engine:
        worker = pid(engine)
        for number in range(20):
            assert (await engine.submit(job(f"small {number}")).result).images
        endless = engine.submit(job("endless", "slow", steps=10_000))
        await asyncio.sleep(2 * STALL)  # it draws on meanwhile
        engine.cancel("endless")
        assert (await engine.submit(job("next")).result).images
        assert endless.attempts == 1
        assert (device(engine).restarts, pid(engine)) == (0, worker)
        os.kill(worker, signal.SIGKILL)
        assert (await engine.submit(job("last")).result).images
        assert device(engine).restarts == 1


async def test_an_order_that_takes_long_to_write_is_no_stall() -> None:
    """The worker stands still for longer than the stall limit while twelve megabytes are on their way to it."""
    async with running(stop_seconds=0.0, patience=Patience(stall=STALL / 4)) as engine:
        worker = pid(engine)
        os.kill(worker, signal.SIGSTOP)
        handle = engine.submit(painted_over("large", 2048))
        await asyncio.sleep(STALL)
        os.kill(worker, signal.SIGCONT)
        assert (await handle.result).images
        assert (handle.attempts, device(engine).restarts) == (1, 0)


class Summary(dict[str, object]):
    """A result's, that can be referred to weakly."""


class DeafChild(ThreadChild):
    """Lives and says so, and reads nothing."""

    def _live(self) -> None:
        assert self._connection is not None
        runner = fake_runner("cpu")
        line = _Line(self._connection)
        line.say(Known(runner.catalogue()))
        line.say(Ready(runner.condition()))
        while self.exitcode is None:
            line.say(Alive())
            time.sleep(0.02)
        self._connection.close()


class DeafNursery(Nursery):
    def make(self, connection: Connection, factory: RunnerFactory, device: str, plan: Plan) -> ThreadChild:
        self.children.append(DeafChild(connection, device, plan))
        return self.children[-1]


async def test_a_worker_that_lives_and_does_not_read_is_found() -> None:
    async with DeafNursery().working(patience=Patience(silence=0.3)) as engine:
        with pytest.raises(WorkerLost, match="does not read what it is told"):
            await engine.submit(painted_over("unread", 2048)).result


class LingeringChild(ThreadChild):
    """Takes its time to die."""

    def _live(self) -> None:
        super()._live()
        time.sleep(0.5)


class LingeringNursery(Nursery):
    def make(self, connection: Connection, factory: RunnerFactory, device: str, plan: Plan) -> ThreadChild:
        self.children.append(LingeringChild(connection, device, plan))
        return self.children[-1]


async def test_an_engine_that_is_stopped_while_a_worker_dies_waits_for_that() -> None:
    nursery = LingeringNursery()
    async with nursery.working() as engine:
        nursery.child.kill()
        await asyncio.sleep(0.1)  # its supervisor has seen it, and waits for its end
    assert len(nursery.children) == 1
    assert not nursery.child.is_alive()
    assert device(engine).state is WorkerState.FAILED


async def test_an_order_that_cannot_be_written_is_answered(nursery: Nursery) -> None:
    """A bug of ours: no request sends what cannot be pickled."""
    async with nursery.working() as engine:
        broken: Any = threading.Lock()
        handle = engine.submit(replace(job("a"), warnings=(broken,)))
        with pytest.raises(WorkerLost):
            await handle.result
        await until(lambda: engine.status().ready)
        nursery.gate.open(100)
        assert (await engine.submit(job("b")).result).images


async def test_nothing_that_was_carried_is_kept_for_the_next() -> None:
    """Either way: an order until another one comes, and a result until the next report."""

    class Silent(ThreadChild):
        """Answers one order with one report, and says nothing else."""

        def _live(self) -> None:
            assert self._connection is not None
            assert isinstance(self._connection.recv(), Run)
            timings = Timings(text_seconds=0.0, denoise_seconds=0.0, decode_seconds=0.0)
            result = JobResult(images=(b"a picture",), cache=Summary(), timings=timings, batches=(1,))
            self._connection.send_bytes(pickle.dumps(Done("a", result)))
            assert isinstance(self._connection.recv(), Stop)
            self.exitcode = 0
            self._connection.close()

    process = WorkerProcess("cpu", lambda theirs: Silent(theirs, "cpu", Plan(heartbeat_seconds=1.0)))
    await process.start()
    gc.collect()
    gc.disable()
    try:
        large = painted_over("a", 16)
        seen = weakref.ref(large.params.img2img.picture)  # type: ignore[union-attr]
        process.send(Run((large,)))
        del large
        report = await process.report()
        assert isinstance(report, Done)
        result = weakref.ref(report.result.cache)
        del report
        await until(lambda: seen() is None and result() is None)
        assert process.delivered < time.monotonic()
    finally:
        gc.enable()
        assert await process.stop(60.0) == 0


@pytest.fixture(scope="module")
async def impatient(anyio_backend: str) -> AsyncIterator[LocalEngine]:
    async with running(stop_seconds=0.0, patience=Patience(stall=STALL)) as engine:
        yield engine


@pytest.mark.parametrize(
    ("model", "deadline"), [("fine", None), ("fine", 60.0), ("raises", 60.0), ("hangs", 0.2), ("hangs", None)]
)
async def test_a_job_that_ended_leaves_no_picture_behind(
    impatient: LocalEngine, model: str, deadline: float | None
) -> None:
    """However it ends, and without the garbage collector. `hangs` without a deadline is cancelled."""
    engine, restarts, heard = impatient, device(impatient).restarts, list[object]()

    async def end_of(wanted: Job) -> JobState:
        handle = engine.submit(wanted, lambda step: heard.append((handle.job.id, step)))
        handle.on_change = lambda: heard.append(handle.state)
        if wanted.model == "hangs" and deadline is None:
            await until(lambda: handle.state is JobState.RUNNING)
            engine.cancel(wanted.id)
        await asyncio.wait({handle.result})
        error = handle.result.exception()
        assert error is None or isinstance(error, ServiceError)
        return handle.state

    wanted = replace(painted_over("a", 16, model), deadline_seconds=deadline)
    seen = weakref.ref(wanted.params.img2img.picture)  # type: ignore[union-attr]
    gc.collect()
    gc.disable()
    try:
        state = await end_of(wanted)
        del wanted
        assert (state is JobState.DONE) == (model == "fine")
        assert heard
        if model == "hangs":  # until its worker is given up, it is that worker's job
            await until(lambda: device(engine).restarts == restarts + 1)
        await until(lambda: seen() is None)  # the writer's thread may not have had its turn since
    finally:
        gc.enable()
