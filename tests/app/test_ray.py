"""The engine on Ray by itself, with two replicas of fake models; tests/e2e/test_cluster.py tries it over HTTP."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from app.engine.types import Job, JobState
from app.errors import Cancelled, DeadlineExceeded, NotReady, QueueFull
from cache import DeepCache, NoCache
from models.base import GenerationParams, Img2Img, Step
from tests.conftest import HAS_RAY

if not HAS_RAY:
    pytest.skip("Ray is an extra that is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


def job(name: str, model: str = "fine", steps: int = 4, **given: Any) -> Job:
    params = GenerationParams(prompt="a", width=8, height=8, steps=steps, guidance_scale=1.0, seeds=(1,))
    return Job(id=name, model=model, params=params, strategy=given.pop("strategy", NoCache()), **given)


@pytest.fixture
async def engine(cluster: Any) -> AsyncIterator[Any]:
    from tests.cluster import RecordingRayEngine

    engine = RecordingRayEngine(cluster)
    await engine.start()
    yield engine
    await engine.stop()


async def test_steps_are_heard_in_order_and_before_the_result(engine: Any) -> None:
    heard: list[Step] = []
    handle = engine.submit(job("steps", steps=6, strategy=DeepCache(interval=3)), heard.append)
    result = await handle.result
    assert [step.decision for step in heard] == [*"CRRCRR"]
    assert [step.index for step in heard] == list(range(6))
    assert len(result.images) == 1
    assert (handle.state, handle.attempts) == (JobState.DONE, 1)


async def test_a_deadline_ends_a_job_that_runs(engine: Any) -> None:
    late = engine.submit(job("late", "slow", steps=10_000, deadline_seconds=0.5))
    with pytest.raises(DeadlineExceeded):
        await late.result
    done = [engine.submit(job(f"after {number}")) for number in range(2)]  # its replica is free again
    await asyncio.gather(*(handle.result for handle in done))


async def test_a_cancel_touches_its_job_alone(engine: Any) -> None:
    handles = [engine.submit(job(f"cancel {number}", "slow", steps=10_000)) for number in range(3)]
    other = engine.submit(job("other"))
    assert engine.cancel("no such job") is False
    for handle in handles:
        assert engine.cancel(handle.job.id) is True
        assert engine.cancel(handle.job.id) is False
        with pytest.raises(Cancelled):
            await handle.result
    assert len((await other.result).images) == 1


async def test_the_bound_counts_what_waits_beside_one_job_a_replica(cluster: Any) -> None:
    from app.ray.engine import RayEngine
    from tests.cluster import APP, REPLICAS

    engine = RayEngine(cluster.workers, APP, queue_size=2)
    await engine.start()
    while sum(device.ready for device in engine.status().devices) < REPLICAS:
        await asyncio.sleep(0.01)
    handles = [engine.submit(job(f"bound {number}", "slow", steps=10_000)) for number in range(2 + REPLICAS)]
    with pytest.raises(QueueFull):
        engine.submit(job("one too many"))
    promised = engine.submit(job("promised"), promised=True)
    await engine.drain(0)
    for handle in (*handles, promised):
        with pytest.raises(NotReady):
            await handle.result
    with pytest.raises(NotReady):
        engine.submit(job("too late"))
    await engine.stop()


async def test_all_can_be_handed_over_at_once(cluster: Any) -> None:
    """As for an autoscaler: Serve holds those that wait."""
    from app.ray.engine import RayEngine
    from tests.cluster import APP

    engine = RayEngine(cluster.workers, APP, at_once=True)
    await engine.start()
    handles = [engine.submit(job(f"at once {number}", "slow", steps=5)) for number in range(5)]
    assert len(await asyncio.gather(*(handle.result for handle in handles))) == len(handles)
    assert [handle.attempts for handle in handles] == [1] * len(handles)
    await engine.stop()


async def test_draining_finishes_what_was_accepted(engine: Any) -> None:
    handles = [engine.submit(job(f"drain {number}", "slow", steps=5)) for number in range(4)]
    await engine.drain(60)
    assert [handle.state for handle in handles] == [JobState.DONE] * 4


async def test_what_cannot_be_told_of_a_job_is_nobody_else_s_loss(engine: Any) -> None:
    """A listener of ours that raises: the request is answered, and the next one is drawn."""

    def broken(step: Step) -> None:
        raise RuntimeError("a bug")

    handle = engine.submit(job("bug"), broken)
    with pytest.raises(Exception, match="The server made a mistake"):
        await handle.result
    assert len((await engine.submit(replace(job("bug"), id="next")).result).images) == 1


def test_the_configuration_is_one_that_serve_and_the_application_know() -> None:
    from ray.serve.schema import ServeDeploySchema

    from app.ray import application as cluster

    written = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text(encoding="utf-8"))
    (application,) = ServeDeploySchema.model_validate(written).applications
    assert application.import_path == f"{cluster.__name__}:{cluster.build.__name__}"
    built = cluster.build(application.args)
    assert built is not None
    assert cluster.Scale.model_validate(application.args).replicas == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": 0}, "replicas"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas is less than replicas"),
        ({"gpus": -1}, "gpus"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], words: str) -> None:
    from app.ray.application import build

    with pytest.raises(ValueError, match=words):
        build(arguments)


def test_devices_are_ray_s_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.ray.application import build

    monkeypatch.setenv("WAVESPEED_DEVICES", "cuda:0,cuda:1")
    with pytest.raises(ValueError, match="leave WAVESPEED_DEVICES unset"):
        build({})


async def test_jobs_that_ended_leave_no_picture_behind(engine: Any) -> None:
    """Without the garbage collector. Serve itself keeps what it was handed last, until it is handed something else."""
    seen: list[weakref.ref[Image.Image]] = []

    async def end_of(wanted: Job) -> JobState:
        handle = engine.submit(wanted, lambda step: repr(handle))
        if wanted.id == "picture 1":
            await asyncio.sleep(0.2)
            engine.cancel(wanted.id)
        await asyncio.wait({handle.result})
        engine.submitted.clear()  # the test's own notes
        return handle.state

    gc.collect()
    gc.disable()
    try:
        for number, state in enumerate((JobState.DONE, JobState.CANCELLED, JobState.DONE, JobState.DONE)):
            plain = job(f"picture {number}", "slow", steps=10_000 if number == 1 else 2)
            picture = Img2Img(picture=Image.new("RGB", (16, 16)))
            seen.append(weakref.ref(picture.picture))
            assert await end_of(replace(plain, params=replace(plain.params, img2img=picture))) is state
            del picture
        async with asyncio.timeout(60):
            while any(reference() is not None for reference in seen[:-1]):
                await asyncio.sleep(0.05)
    finally:
        gc.enable()
