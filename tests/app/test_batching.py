"""Jobs that are drawn together: each has its own pictures, steps and end, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from app.engine import memory
from app.engine.pipe import Failed, Progress
from app.engine.runner import RegistryRunner
from app.engine.supervisor import LocalEngine
from app.engine.types import JobHandle, JobState, WorkerState
from app.errors import DeadlineExceeded, WorkerLost
from cache import CacheStrategy
from models.base import Generation, GenerationParams, Step, StepHook, StepsHook
from models.errors import GenerationCancelled
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import FakeModel, FakeRegistry, OutOfMemoryError
from tests.app.test_engine import device, job, until
from tests.app.test_interleavings import is_right
from tests.app.test_server import samples

INTERLEAVINGS = 200


@pytest.fixture
async def engine(nursery: Nursery) -> AsyncIterator[LocalEngine]:
    async with nursery.working(max_batch_size=4) as engine:
        yield engine


async def grouped(nursery: Nursery, engine: LocalEngine, names: Iterable[str], steps: int = 3) -> list[JobHandle]:
    """Jobs that are one group: they wait behind another one, which is done when this returns."""
    first = engine.submit(job("first", steps=1))
    handles = [engine.submit(job(name, steps=steps), lambda step: None) for name in names]
    nursery.gate.open(3)  # text, step and decode of the first one
    await first.result
    await until(lambda: nursery.gate.at == "text")
    nursery.child.sent.clear()
    return handles


async def test_a_group_is_drawn_once_and_each_job_gets_its_own(nursery: Nursery, engine: LocalEngine) -> None:
    handles = await grouped(nursery, engine, "abcde")
    assert [handle.state for handle in handles] == [JobState.RUNNING] * 4 + [JobState.QUEUED]
    assert (engine.status().running, engine.status().pending, handles[4].place) == (4, 1, 1)
    before = len(nursery.gate.passed)
    nursery.gate.open(100)
    results = [await handle.result for handle in handles]
    assert nursery.gate.passed[before : before + 5] == ["text", "step 0", "step 1", "step 2", "decode"]
    assert all(map(is_right, handles))
    assert [result.batches for result in results] == [(4,), (), (), (), (1,)]
    for name in "abcd":
        assert nursery.child.told(name) == [Step(index, 3, letter) for index, letter in enumerate("CRR")]
    together = [one for one in nursery.child.sent if isinstance(one, Progress) and "a" in one.steps]
    assert [set(one.steps) for one in together] == [set("abcd")] * 3, "a step is one report, however many hear of it"


async def test_a_cancelled_member_stops_nobody_else(nursery: Nursery, engine: LocalEngine) -> None:
    handles = await grouped(nursery, engine, "abc")
    await nursery.reach("step 1")
    assert engine.cancel("b")
    assert handles[1].state is JobState.CANCELLED
    await until(nursery.child.has_orders)
    assert device(engine).state is WorkerState.BUSY
    nursery.gate.open(100)
    await handles[2].result
    assert is_right(handles[0])
    assert is_right(handles[2])
    assert [len(nursery.child.told(name)) for name in "abc"] == [3, 2, 3]
    failures = [report for report in nursery.child.sent if isinstance(report, Failed)]
    assert [(report.job_id, report.error.type) for report in failures] == [("b", "cancelled")]
    assert (await engine.submit(job("d")).result).images


async def test_cancels_hit_their_jobs_alone_in_all_interleavings(nursery: Nursery, engine: LocalEngine) -> None:
    """Some of three are cancelled when the worker has got so far, or, in half of the cases, while it goes on."""
    chance = random.Random(7)
    points = ("text", "step 0", "step 1", "decode")
    ends = Counter[JobState]()
    for number in range(INTERLEAVINGS):
        handles = await grouped(nursery, engine, [f"{number}{name}" for name in "abc"], steps=2)
        following = engine.submit(job(f"{number}d", steps=2))
        point, races = chance.choice(points), chance.random() < 0.5
        nursery.gate.open(points.index(point))
        if not races:
            await until(lambda point=point: nursery.gate.at == point)
        left = chance.sample(handles, chance.randrange(1, 4))
        for handle in left:
            assert engine.cancel(handle.job.id)
        nursery.gate.open(100)
        await following.result
        nursery.gate.close()
        for handle in (*handles, following):
            ends[handle.state] += 1
            assert handle.state is (JobState.CANCELLED if handle in left else JobState.DONE)
            assert handle in left or is_right(handle)
    assert len(ends) == 2
    assert len(nursery.children) == 1


async def test_a_group_that_nobody_waits_for_stops_within_a_step(nursery: Nursery, engine: LocalEngine) -> None:
    handles = await grouped(nursery, engine, "abc", steps=50)
    await nursery.reach("step 1")
    for name in "ab":
        engine.cancel(name)
    handles[2].job = replace(handles[2].job, deadline_seconds=1)
    engine._expire(handles[2])
    with pytest.raises(DeadlineExceeded, match="ran"):
        handles[2].result.result()
    await until(lambda: nursery.child.has_orders())
    following = engine.submit(job("d", steps=1))
    before = len(nursery.gate.passed)
    nursery.gate.open(100)
    await following.result
    steps = [thing for thing in nursery.gate.passed[before:-3] if thing.startswith("step")]
    assert 1 <= len(steps) <= 2  # the second where not all three orders had arrived yet
    assert is_right(following)


async def test_members_of_a_lost_worker_are_tried_one_by_one(nursery: Nursery, engine: LocalEngine) -> None:
    handles = await grouped(nursery, engine, "abc")
    await nursery.reach("step 1")
    engine.cancel("b")
    nursery.child.kill()
    await until(lambda: len(nursery.children) == 2 and nursery.gate.at == "text")
    assert [handle.state for handle in handles] == [JobState.RUNNING, JobState.CANCELLED, JobState.QUEUED]
    nursery.gate.open(100)
    assert (await handles[2].result).batches == (1,)
    assert is_right(handles[0])
    assert is_right(handles[2])
    assert [handle.attempts for handle in handles] == [2, 1, 2]


async def test_who_kills_the_worker_alone_as_well_is_answered_and_the_others_are_done(
    nursery: Nursery, engine: LocalEngine
) -> None:
    handles = await grouped(nursery, engine, "abc")
    nursery.child.kill()
    await until(lambda: len(nursery.children) == 2 and nursery.gate.at == "text")
    nursery.child.kill()  # while it draws the first one
    await until(lambda: len(nursery.children) == 3 and nursery.gate.at == "text")
    nursery.gate.open(100)
    with pytest.raises(WorkerLost):
        await handles[0].result
    assert (await handles[2].result).images
    assert is_right(handles[1])


async def one_who_waits(nursery: Nursery, engine: LocalEngine) -> JobHandle:
    """For company: four came at once a moment ago."""
    handles = await grouped(nursery, engine, "abcd", steps=1)
    nursery.gate.open(100)
    await asyncio.gather(*(handle.result for handle in handles))
    alone = engine.submit(job("e", steps=1))
    assert alone.state is JobState.QUEUED
    return alone


async def test_who_waits_for_company_is_found_or_started(nursery: Nursery) -> None:
    async with nursery.working(max_batch_size=4, batch_timeout=2) as engine:
        alone = await one_who_waits(nursery, engine)
        result = await alone.result  # nobody comes: the clock starts it
        assert result.batches == (1,)
        assert (await engine.submit(job("f", steps=1)).result).images


async def test_draining_waits_for_no_company(nursery: Nursery) -> None:
    async with nursery.working(max_batch_size=4, batch_timeout=1000) as engine:
        alone = await one_who_waits(nursery, engine)
        await engine.drain(60)
        assert is_right(alone)


async def test_a_model_is_loaded_once_for_its_group(nursery: Nursery, engine: LocalEngine) -> None:
    first = engine.submit(job("first", steps=1))
    handles = [engine.submit(job(name, "slow", steps=1)) for name in "ab"]
    nursery.gate.open(100)
    await asyncio.gather(*(handle.result for handle in (first, *handles)))
    assert nursery.gate.passed.count("load") == 1
    assert [result.batches for result in (await handles[0].result, await handles[1].result)] == [(2,), ()]


class Registry(FakeRegistry):
    def __init__(self, model: FakeModel) -> None:
        super().__init__()
        self._loaded = {"fine": model}


class Noted(FakeModel):
    """Notes how many images each run had."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        self.runs.append(len(params.seeds))
        return super().generate(params, strategy, on_step)


class OneBad(Noted):
    """Runs out of memory for one seed, and for several images."""

    def generate(self, params: GenerationParams, strategy: CacheStrategy, on_step: StepHook) -> Generation:
        generation = super().generate(params, strategy, on_step)
        if len(params.seeds) > 1 or params.prompt == "bad":
            raise OutOfMemoryError("CUDA out of memory")
        return generation


def outcomes(model: FakeModel, prompts: Sequence[str], on_steps: Any = lambda steps: None) -> list[Any]:
    jobs = [job(str(number)) for number in range(len(prompts))]
    jobs = [replace(one, params=replace(one.params, prompt=prompt)) for one, prompt in zip(jobs, prompts, strict=True)]
    out: list[Any] = []
    for finish in RegistryRunner(Registry(model), "x").draw(jobs, on_steps):
        try:
            out.append(finish())
        except Exception as error:  # noqa: BLE001  # it is looked at
            out.append(type(error))
    return out


def test_one_who_fails_together_is_found_alone() -> None:
    model = OneBad()
    made = outcomes(model, ["a", "bad", "a"])
    assert made[1] is OutOfMemoryError
    assert made[0].images
    assert made[2].images
    assert model.runs == [3, 1, 1, 1]


@pytest.mark.parametrize(("fit", "runs"), [(8, [5]), (3, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_as_many_are_drawn_together_as_fit(monkeypatch: pytest.MonkeyPatch, fit: int, runs: list[int]) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: fit * 64 * 64)
    model = Noted()
    made = outcomes(model, ["a"] * 5)
    assert model.runs == runs
    assert [result.batches for result in made if result.batches] == [(size,) for size in runs]
    assert not any(sentence for result in made for sentence in result.warnings if "fit" in sentence)


def test_what_all_gave_up_is_not_tried_again() -> None:
    def stop(steps: dict[str, Step]) -> None:
        raise GenerationCancelled

    model = Noted()
    assert outcomes(model, ["a", "b"], stop) == [GenerationCancelled] * 2
    assert model.runs == [2]


class Half(FakeModel):
    """Two batches, as for texts of two lengths; the second fails."""

    def generate_together(
        self, requests: Sequence[GenerationParams], strategy: CacheStrategy, on_steps: StepsHook
    ) -> list[Generation | Exception]:
        return [*super().generate_together(requests[:1], strategy, on_steps), RuntimeError("of the second one")]


def test_the_failure_of_one_batch_is_its_own() -> None:
    made = outcomes(Half(), ["a", "b"])
    assert [len(result.images) for result in made] == [1, 1]


async def test_batches_are_counted_once() -> None:
    nursery = Nursery()
    engine = nursery.engine(max_batch_size=4)
    async with client_of(engine) as client:
        await until(lambda: engine.status().ready)
        body = {"prompt": "a", "width": 64, "height": 64, "steps": 1}
        first = asyncio.create_task(client.post("/api/generate", json=body))
        await until(lambda: nursery.gate.at == "text")
        others = [asyncio.create_task(client.post("/api/generate", json=body)) for _ in range(3)]
        await until(lambda: engine.status().pending == 3)
        nursery.gate.open(100)
        for answer in await asyncio.gather(first, *others):
            assert answer.status_code == 200
        telemetry = (await client.get("/api/telemetry")).json()
        assert (telemetry["requests_processed"], telemetry["images_produced"], telemetry["batches_processed"]) == (
            4,
            4,
            2,
        )
        counted = samples((await client.get("/metrics")).text)
        assert counted["wavespeed_batch_images_sum", frozenset()] == 4
        assert counted["wavespeed_batch_images_count", frozenset()] == 2
