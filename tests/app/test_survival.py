"""What workers do to the service, and what it does then: real processes that hang, freeze, stop and are killed."""

from __future__ import annotations

import asyncio
import base64
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from app.engine.slot import Patience
from app.engine.supervisor import LocalEngine
from app.errors import GenerationFailed, WorkerLost
from app.http.resolve import resolve
from app.http.schemas import parse
from app.settings import Settings
from tests.app.conftest import client_of
from tests.app.fakes import fake_runner
from tests.app.test_engine import device, job, pid, running, until
from tests.app.test_jobs import ended
from tests.app.test_server import samples

REQUESTS = "wavespeed_requests_total"
KILLS = 20
CLIENTS = 4
BODY = {"prompt": "a", "width": 64, "height": 64, "model": "slow", "steps": 5}


@asynccontextmanager
async def impatient(patience: Patience) -> AsyncIterator[LocalEngine]:
    async with running(stop_seconds=0.0, patience=patience) as engine:
        yield engine


@pytest.mark.parametrize(
    ("model", "patience", "reason"),
    [
        ("hangs", Patience(stall=0.3), "finished no step"),
        ("frozen", Patience(silence=1.0), "no sign of life"),
    ],
)
async def test_a_worker_that_hangs_is_replaced_and_its_job_answered(
    model: str, patience: Patience, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """`hangs` lets the other threads of its process live, `frozen` holds the interpreter's lock for ever."""
    async with impatient(patience) as engine:
        worker = pid(engine)
        handle, following = engine.submit(job("a", model)), engine.submit(job("b"))
        with pytest.raises(WorkerLost, match=reason):
            await handle.result
        assert handle.attempts == 2
        assert (await following.result).images
        assert pid(engine) != worker
        assert reason in str(device(engine).reason)
    assert "in step" in capfd.readouterr().err  # where it hung, from the worker itself


async def test_an_idle_worker_that_is_stopped_is_replaced() -> None:
    async with impatient(Patience(silence=1.0)) as engine:
        worker = pid(engine)
        os.kill(worker, signal.SIGSTOP)
        await until(lambda: engine.status().ready and device(engine).pid != worker)
        assert (await engine.submit(job("a")).result).images


async def test_an_answer_that_is_no_result_is_a_failure_and_the_worker_stays() -> None:
    async with running() as engine:
        worker = pid(engine)
        with pytest.raises(GenerationFailed):
            await engine.submit(job("a", "garbage")).result
        assert (await engine.submit(job("b")).result).images
        assert pid(engine) == worker


async def test_twenty_kills_under_four_clients_cost_no_answer_and_no_picture() -> None:
    """Half of the clients ask and wait, the others make jobs; the worker is killed whatever it is doing."""
    engine = LocalEngine(fake_runner, ["cpu"], backoff=(0.0, 0.01), quarantine_seconds=0.1)
    chance = random.Random(20)
    expected = {seed: base64.b64encode(drawn(seed)).decode() for seed in range(8)}
    answers = Counter[str]()
    accepted: list[str] = []
    over = asyncio.Event()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        while not over.is_set():
            seed = chance.randrange(8)
            response = await client.post("/api/jobs" if number % 2 else "/api/generate", json={**BODY, "seed": seed})
            answer = response.json()
            if response.status_code == 202:
                accepted.append(answer["id"])
                answer = await ended(client, answer["id"])
                assert (answer["state"] == "done") == (answer["error"] is None)
                outcome = "ok" if answer["state"] == "done" else answer["error"]["type"]
                answer = answer["result"]
            elif response.status_code == 200:
                outcome = "ok"
            else:
                assert response.status_code == 503
                assert int(response.headers["retry-after"]) > 0
                outcome = answer["error"]["type"]
            if outcome == "ok":
                assert answer["image"] == expected[seed]
            else:
                await asyncio.sleep(0.05)  # a refusal is immediate: a client that does not pause would be all there is
            answers[outcome] += 1

    async with client_of(engine) as client:
        await until(lambda: engine.status().ready)
        clients = [asyncio.create_task(ask(client, number)) for number in range(CLIENTS)]
        for number in range(KILLS):
            if number % 2:  # others may do so too, where the machine is quick enough
                good = answers["ok"]
                await until(lambda good=good: answers["ok"] > good)
            if number % 4:  # some workers do not live to see a job
                await until(lambda: engine.status().running == 1)
            await asyncio.sleep(chance.uniform(0, 0.3))
            worker = pid(engine)
            os.kill(worker, signal.SIGKILL)
            await until(lambda worker=worker: device(engine).pid not in (None, worker))
        over.set()
        await asyncio.gather(*clients)
        counted = samples((await client.get("/metrics")).text)
        for identity in accepted:
            assert (await client.get(f"/api/jobs/{identity}")).json()["finished"] is not None
    assert set(answers) <= {"ok", "worker_lost", "not_ready", "model_unavailable"}
    assert answers["ok"] >= KILLS / 2
    # Counted once each: no job ended twice, and none was forgotten.
    requests = Counter[str]()
    for (name, labels), value in counted.items():
        if name == REQUESTS and value:
            requests[dict(labels)["outcome"]] += int(value)
    assert requests == answers


def drawn(seed: int) -> bytes:
    """The picture that the fake draws for `seed`, made here without an engine, text chunks and all."""
    runner = fake_runner("cpu")
    wanted = resolve(parse({**BODY, "seed": seed}), runner.catalogue(), Settings(), "x")
    return runner.run(wanted, lambda step: None).images[0]
