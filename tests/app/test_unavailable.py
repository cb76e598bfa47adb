"""A model that cannot be loaded costs its own requests and nobody else's, and it is said which one and why."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from app.engine.runner import RegistryRunner
from app.engine.supervisor import START_FAILURES, LocalEngine
from app.engine.types import JobState
from app.errors import ModelUnavailable, NotReady
from models.errors import LoadFailed
from tests.app.conftest import client_of
from tests.app.fakes import (
    FakeModel,
    FakeRegistry,
    OutOfMemoryError,
    broken_flux_runner,
    broken_runner,
    folder_runner,
)
from tests.app.test_engine import device, job, pid, until
from tests.app.test_server import post

WHY = "Its files do not load; the server's log says why."


def put(folder: Path, device: str, *names: str) -> None:
    (folder / device).mkdir(exist_ok=True)
    for name in names:
        (folder / device / name).touch()


def engine_of(folder: Path, *names: str, devices: tuple[str, ...] = ("cpu",)) -> LocalEngine:
    factory = partial(folder_runner, folder=folder, names=names)
    return LocalEngine(factory, devices, backoff=(0.01, 0.01), stop_seconds=0.0)


@contextmanager
def refused() -> Iterator[None]:
    with pytest.raises(ModelUnavailable, match="do not load") as caught:
        yield
    assert caught.value.retry_after


@asynccontextmanager
async def serving(engine: LocalEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine) as client:
        await until(lambda: all(device.up for device in engine.status().devices))
        yield client


async def test_without_the_default_model_the_others_are_served_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "cpu", "slow")
    engine = engine_of(tmp_path, "fine", "slow")
    async with serving(engine) as client:
        worker = pid(engine)
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["unavailable"]) == (200, {"fine": WHY})
        rows = {row["name"]: row for row in (await client.get("/api/models")).json()["models"]}
        assert (rows["fine"]["available"], rows["fine"]["reason"]) == (False, WHY)
        assert (rows["slow"]["available"], rows["slow"]["reason"]) == (True, None)
        assert (await post(client, model="slow", steps=1)).status_code == 200
        for body in ({}, {"model": "fine"}):
            answer = await post(client, **body)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "model_unavailable")
            assert int(answer.headers["retry-after"]) > 0
            assert str(tmp_path) not in answer.text
        assert f"{tmp_path / 'cpu' / 'fine'} is missing" in caplog.text
        assert (pid(engine), device(engine).restarts) == (worker, 0)

        put(tmp_path, "cpu", "fine")
        assert (await post(client)).status_code == 200
        assert engine.status().unavailable == {}
        assert (await client.get("/readyz")).json()["unavailable"] == {}
        assert all(row["available"] for row in (await client.get("/api/models")).json()["models"])


async def test_what_comes_into_the_folder_is_told_while_the_server_runs(tmp_path: Path) -> None:
    put(tmp_path, "cpu", "fine")
    engine = engine_of(tmp_path, "fine")
    async with serving(engine) as client:
        put(tmp_path, "cpu", "odd.safetensors")
        await until(lambda: bool(engine.catalogue().unserved))
        row = (await client.get("/api/models")).json()["models"][-1]
        assert row == {"name": "odd", "available": False, "reason": "odd.safetensors is empty.", "loaded": False}
        answer = await post(client, model="odd")
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            404,
            "'odd' is not served. odd.safetensors is empty.",
        )
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["fine"]
        assert [model["title"] for model in (await client.get("/sdapi/v1/sd-models")).json()] == ["fine"]


async def test_files_that_vanish_take_nothing_that_is_loaded(tmp_path: Path) -> None:
    put(tmp_path, "cpu", "fine", "slow")
    engine = engine_of(tmp_path, "fine", "slow")
    async with serving(engine) as client:
        (tmp_path / "cpu" / "fine").unlink()
        assert (await post(client)).status_code == 200
        os.kill(pid(engine), signal.SIGKILL)
        await until(lambda: device(engine).restarts == 1 and engine.status().ready)
        assert (await client.get("/readyz")).json()["unavailable"] == {"fine": WHY}
        assert (await post(client)).status_code == 503
        assert (await post(client, model="slow", steps=1)).status_code == 200


async def test_the_model_for_flux_is_told_of_before_anybody_asks_for_it() -> None:
    """Only the default model is loaded at the start; what is wrong with the others' files is seen all the same."""
    async with serving(LocalEngine(broken_flux_runner, ["cpu"])) as client:
        assert (await client.get("/readyz")).json()["unavailable"] == {"broken": WHY}
        answer = await post(client, model="broken")
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "model_unavailable")
        assert (await post(client)).status_code == 200


async def test_what_one_device_cannot_load_another_one_draws(tmp_path: Path) -> None:
    put(tmp_path, "cpu", "fine", "slow")
    put(tmp_path, "cpu:1", "fine")
    engine = engine_of(tmp_path, "fine", "slow", devices=("cpu:1", "cpu"))
    async with serving(engine) as client:
        handles = [engine.submit(job(f"job {number}", "slow", steps=3)) for number in range(6)]
        assert all(result.images for result in await asyncio.gather(*(handle.result for handle in handles)))
        assert sum(handle.attempts for handle in handles) == len(handles) + 1  # once it was tried where it cannot be
        assert engine.status().unavailable == {}
        assert (await client.get("/readyz")).json()["unavailable"] == {}
        held = [engine.submit(job(f"held {number}", "slow", steps=10_000)) for number in range(2)]
        passing = await engine.submit(job("other")).result  # by the device that leaves those alone
        assert passing.images
        assert [handle.state for handle in held] == [JobState.RUNNING, JobState.QUEUED]

        (tmp_path / "cpu" / "slow").unlink()
        os.kill(next(one.pid for one in engine.status().devices if one.device == "cpu") or 0, signal.SIGKILL)
        for handle in held:  # nobody has it any more
            with refused():
                await handle.result
        assert engine.status().unavailable == {"slow": WHY}


async def test_with_nothing_to_serve_instead_there_is_no_worker(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, "fine")
    async with client_of(engine) as client:
        with pytest.raises(NotReady):
            await engine.submit(job("a")).result
        with pytest.raises(NotReady):
            engine.admit("fine")
        assert device(engine).restarts >= START_FAILURES - 1
        assert (await client.get("/readyz")).status_code == 503
        put(tmp_path, "cpu", "fine")
        await until(lambda: engine.status().ready)
        assert (await post(client)).status_code == 200


async def test_a_default_model_is_tried_again_at_each_request_and_at_no_other_time() -> None:
    engine = LocalEngine(broken_runner, ["cpu"])
    async with serving(engine):
        assert engine.status().unavailable == {"broken": WHY}
        engine.admit("broken")
        with refused():
            await engine.submit(job("a", "broken")).result
        assert (await engine.submit(job("b")).result).images


class ShortRegistry(FakeRegistry):
    """Has memory for one model at a time, and finds out while it loads a second one."""

    def get(self, name: str, beside: str | None = None) -> FakeModel:
        if self._loaded and name not in self._loaded:
            raise LoadFailed(f"{name} is damaged: CUDA out of memory") from OutOfMemoryError()
        return super().get(name)


def test_a_load_that_runs_out_of_memory_takes_that_of_idle_models() -> None:
    runner = RegistryRunner(ShortRegistry(), "fake device")
    for name in ("fine", "slow", "flux"):
        runner.load(name)
        assert runner.condition().loaded == (name,)
