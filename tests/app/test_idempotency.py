"""The same request sent twice: one job, whatever its fate and whoever asks meanwhile."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from app.engine.types import JobHandle
from app.errors import ServiceError
from app.jobs.store import JobStore
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_jobs import BODY, asked, ended, served


async def test_a_key_makes_one_job_of_a_request_sent_twice(nursery: Nursery) -> None:
    async with served(nursery, api_keys=("one", "two")) as client:

        def as_client(name: str, key: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {name}", "Idempotency-Key": key}

        answers = await asyncio.gather(*(asked(client, as_client("one", "k")) for _ in range(3)))
        assert {answer.status_code for answer in answers} == {202}
        [identity] = {answer.json()["id"] for answer in answers}
        quoted = await asked(client, as_client("one", '"k"'))  # the draft's form of the same key
        assert quoted.json()["id"] == identity
        reordered = {name: BODY[name] for name in reversed(BODY)}
        again = await client.post("/api/jobs", json=reordered, headers=as_client("one", "k"))
        assert again.json()["id"] == identity
        other = await asked(client, as_client("one", "k"), seed=2)
        assert (other.status_code, other.json()["error"]["type"]) == (422, "idempotency_conflict")
        assert (await asked(client, as_client("two", "k"), seed=2)).json()["id"] != identity  # not theirs to see
        assert (await asked(client, as_client("one", "l"))).json()["id"] != identity
        for bad in ("", "k" * 256, "ключ"):
            refused = await asked(client, {**as_client("one", "k"), "Idempotency-Key": bad.encode()})  # type: ignore[dict-item]
            assert (refused.status_code, refused.json()["error"]["field"]) == (422, "Idempotency-Key")


@pytest.mark.parametrize("failure", ["storage_failed", "worker_lost", "out_of_memory", "deadline_exceeded"])
async def test_a_failure_that_may_pass_frees_its_key(tmp_path: Path, failure: str) -> None:
    class Failing(FakeEngine):
        fails = True

        def submit(self, job: Any, on_step: Any = None, *, promised: bool = False) -> JobHandle:
            if not self.fails:
                return super().submit(job, on_step)
            [kind] = [one for one in ServiceError.__subclasses__() if one.type == failure]
            handle = JobHandle(job, on_step)
            handle.run()
            handle.fail(kind("Not now."))
            return handle

    engine, key = Failing(), {"Idempotency-Key": "k"}
    async with client_of(engine, jobs_folder=tmp_path) as client:
        failed = await ended(client, (await asked(client, key)).json()["id"])
        assert (failed["state"], failed["error"]["type"]) == ("failed", failure)
        engine.fails = False
        done = await ended(client, (await asked(client, key)).json()["id"])
        assert (done["state"], done["id"] != failed["id"]) == ("done", True)
        assert (await asked(client, key)).json()["id"] == done["id"]
    async with client_of(engine, jobs_folder=tmp_path) as client:  # the disk has it alike
        assert (await asked(client, key)).json()["id"] == done["id"]


@pytest.mark.parametrize("fails", [False, True])
async def test_nobody_is_told_202_before_it_is_written(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A second caller with the same key waits for the first one's write, and ends as it does."""
    gate, writing, put = asyncio.Event(), asyncio.Event(), JobStore.put

    async def slow(store: JobStore, record: Any, *, with_request: bool) -> None:
        writing.set()
        await gate.wait()
        if fails:
            raise sqlite3.OperationalError("database or disk is full")
        await put(store, record, with_request=with_request)

    async with served(nursery, jobs_folder=tmp_path) as client:
        nursery.gate.open(100)
        with monkeypatch.context() as patch:
            patch.setattr(JobStore, "put", slow)
            callers = [asyncio.create_task(asked(client, {"Idempotency-Key": "k"})) for _ in range(2)]
            await writing.wait()
            await asyncio.wait(callers, timeout=0.1)
            assert not any(caller.done() for caller in callers)
            gate.set()
            answers = await asyncio.gather(*callers)
        assert {answer.status_code for answer in answers} == ({503} if fails else {202})
        identities = {answer.json().get("id") for answer in answers}
        assert len(identities) == 1
        again = (await asked(client, {"Idempotency-Key": "k"})).json()["id"]
        assert (again in identities) is not fails
        assert (await ended(client, again))["state"] == "done"
