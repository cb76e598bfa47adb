"""/api/jobs: asked for, watched, cancelled, repeated, kept, and what a restart makes of it."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import sqlite3
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.engine.types import JobHandle
from app.jobs.record import EventLog
from app.jobs.store import FILE_NAME, JobStore, Results
from models.base import Step
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_engine import until

REQUESTS = "wavespeed_requests_total{"
BODY = {"prompt": "a", "width": 64, "height": 64, "seed": 1, "steps": 3}


@asynccontextmanager
async def served(nursery: Nursery, *, queue_size: int = 64, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app whose worker waits at `nursery.gate`."""
    engine = nursery.engine(queue_size=queue_size)
    async with client_of(engine, **settings) as client:
        await until(lambda: engine.status().ready)
        yield client


async def asked(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return await client.post("/api/jobs", json={**BODY, **body}, headers=headers)


async def ended(client: httpx.AsyncClient, identity: str) -> dict[str, Any]:
    """The job, once it has ended: its events say when."""
    await client.get(f"/api/jobs/{identity}/events")
    job: dict[str, Any] = (await client.get(f"/api/jobs/{identity}")).json()
    return job


def parsed(stream: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Id, name and data of each event, comments left out."""
    found = []
    for block in stream.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def stable(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run."""
    return {key: value for key, value in answer.items() if key not in ("request_id", "timings")}


async def test_a_job_ends_with_the_answer_that_generate_gives(nursery: Nursery) -> None:
    async with served(nursery) as client:
        nursery.gate.open(100)
        accepted = await asked(client, deepcache_enabled=True, num_images=2)
        assert accepted.status_code == 202
        job = accepted.json()
        assert accepted.headers["location"] == f"/api/jobs/{job['id']}"
        assert job["error"] is None
        done = await ended(client, job["id"])
        assert (done["state"], done["attempts"], done["position"]) == ("done", 1, None)
        assert done["created"] <= done["started"] <= done["finished"]
        direct = await client.post("/api/generate", json={**BODY, "deepcache_enabled": True, "num_images": 2})
        assert stable(done["result"]) == stable(direct.json())
        assert done["result"]["request_id"] == job["id"]
        assert len(done["result"]["images"]) == 2
        metrics = (await client.get("/metrics")).text
    assert 'wavespeed_requests_total{model="fine",outcome="ok"} 2.0' in metrics


async def test_events_tell_the_whole_story_and_can_be_resumed(nursery: Nursery) -> None:
    async with served(nursery) as client:
        first = (await asked(client)).json()["id"]
        second = (await asked(client, deepcache_enabled=True)).json()["id"]
        stream = asyncio.create_task(client.get(f"/api/jobs/{second}/events"))
        await until(lambda: nursery.gate.at == "text")
        assert (await client.get(f"/api/jobs/{second}")).json()["position"] == 1
        nursery.gate.open(100)
        response = await stream
        assert response.headers["content-type"].startswith("text/event-stream")
        events = parsed(response.text)
        assert [number for number, _, _ in events] == list(range(1, len(events) + 1))
        assert [(name, data) for _, name, data in events] == [
            ("queued", {"position": 1}),
            ("running", {"attempt": 1}),
            ("progress", {"step": 1, "total": 3, "decision": "C"}),
            ("progress", {"step": 2, "total": 3, "decision": "R"}),
            ("progress", {"step": 3, "total": 3, "decision": "R"}),
            ("done", {"id": second, "location": f"/api/jobs/{second}"}),
        ]
        resumed = await client.get(f"/api/jobs/{second}/events", headers={"Last-Event-ID": "4"})
        assert parsed(resumed.text) == events[4:]
        for strange in ("x", "-1", "9" * 5000, "٣"):
            again = await client.get(f"/api/jobs/{second}/events", headers={"Last-Event-ID": strange.encode()})
            assert parsed(again.text) == events
        for seen in (str(len(events)), "999"):  # a browser told 204 comes no more; told nothing it comes for ever
            beyond = await client.get(f"/api/jobs/{second}/events", headers={"Last-Event-ID": seen})
            assert (beyond.status_code, beyond.text) == (204, "")
        assert (await ended(client, first))["state"] == "done"


class PreviewEngine(FakeEngine):
    """Runs a job on the next turn of the loop, and shows a picture at each step."""

    def submit(self, job: Any, on_step: Any = None, *, promised: bool = False) -> Any:
        handle = JobHandle(job, on_step)

        def run() -> None:
            handle.run()
            for index in range(2):
                on_step(Step(index, 2, "C", f"jpeg {index}".encode()))
            handle.succeed(self._result(job))

        asyncio.get_running_loop().call_soon(run)
        return handle


async def test_previews_travel_on_the_stream_and_only_the_newest_is_kept() -> None:
    async with client_of(PreviewEngine()) as client:
        identity = (await asked(client)).json()["id"]
        events = parsed((await client.get(f"/api/jobs/{identity}/events")).text)
    previews = [data for _, name, data in events if name == "preview"]
    assert [base64.b64decode(data["image"]) for data in previews] == [b"jpeg 1"]
    assert (previews[0]["step"], previews[0]["media_type"]) == (2, "image/jpeg")
    assert [name for _, name, _ in events].count("progress") == 2


async def test_a_follower_sees_each_event_once_and_stops_at_the_end() -> None:
    log = EventLog()
    seen: list[int] = []

    async def follow() -> None:
        async for event in log.follow():
            seen.append(event.number)

    follower = asyncio.create_task(follow())
    for step in range(3):
        log.publish("progress", {"step": step})
        await asyncio.sleep(0)
    log.publish("done", {})
    log.publish("error", {})  # a job ends once
    await follower
    assert seen == [1, 2, 3, 4]
    log.trim()
    assert [event.name async for event in log.follow()] == ["done"]


async def test_a_cancel_ends_the_job_and_a_second_one_changes_nothing(nursery: Nursery) -> None:
    async with served(nursery) as client:
        running, waiting = [(await asked(client)).json()["id"] for _ in range(2)]
        await until(lambda: nursery.gate.at == "text")
        for identity in (waiting, running):
            for _ in range(2):
                cancelled = await client.delete(f"/api/jobs/{identity}")
                assert cancelled.status_code == 200
                assert (cancelled.json()["state"], cancelled.json()["error"]["type"]) == ("cancelled", "cancelled")
            [(_, name, data)] = parsed((await client.get(f"/api/jobs/{identity}/events")).text)[-1:]
            assert (name, data["error"]["type"]) == ("error", "cancelled")
        nursery.gate.open(100)
        done = (await asked(client)).json()["id"]
        assert (await ended(client, done))["state"] == "done"
        late = await client.delete(f"/api/jobs/{done}")
        assert (late.status_code, late.json()["error"]["type"]) == (409, "job_finished")
        assert (await client.get(f"/api/jobs/{done}")).json()["state"] == "done"


@pytest.mark.parametrize("path", ["", "/events"])
@pytest.mark.parametrize("identity", ["0" * 32, "nothing", "%2e%2e", "a" * 5000, "%00"])
async def test_an_unknown_job_is_a_404(client: httpx.AsyncClient, identity: str, path: str) -> None:
    response = await client.get(f"/api/jobs/{identity}{path}")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "unknown_job")
    if not path:
        assert (await client.delete(f"/api/jobs/{identity}")).status_code == 404


async def test_a_refused_job_leaves_nothing(nursery: Nursery) -> None:
    async with served(nursery, queue_size=1) as client:
        key = {"Idempotency-Key": "k"}
        assert (await asked(client, key, width=65)).json()["error"]["field"] == "width"
        assert (await asked(client, key, deadline_seconds=3601)).json()["error"]["field"] == "deadline_seconds"
        taken = [(await asked(client)).json()["id"] for _ in range(2)]
        full = await asked(client, key)
        assert (full.status_code, full.json()["error"]["type"]) == (429, "queue_full")
        assert int(full.headers["retry-after"]) > 0
        await client.delete(f"/api/jobs/{taken[1]}")
        assert (await asked(client, key)).status_code == 202  # the key was not used up


async def test_a_job_past_its_deadline_is_told_so(nursery: Nursery) -> None:
    async with served(nursery) as client:
        identity = (await asked(client, deadline_seconds=0.05)).json()["id"]
        job = await ended(client, identity)
        assert (job["state"], job["error"]["type"]) == ("failed", "deadline_exceeded")
        direct = await client.post("/api/generate", json={**BODY, "deadline_seconds": 0.05})
        assert (direct.status_code, direct.json()["error"]["type"]) == (504, "deadline_exceeded")
        nursery.gate.open(100)


async def test_the_servers_deadline_holds_where_a_request_names_none(nursery: Nursery) -> None:
    async with served(nursery, deadline_seconds=0.05) as client:
        direct = await client.post("/api/generate", json=BODY)
        assert direct.status_code == 504
        longer = await client.post("/api/generate", json={**BODY, "deadline_seconds": 1})
        assert (longer.status_code, longer.json()["error"]["field"]) == (422, "deadline_seconds")
        nursery.gate.open(100)


@pytest.mark.parametrize("in_folder", [False, True])
async def test_results_are_bounded_in_size_and_the_newest_stays(tmp_path: Path, in_folder: bool) -> None:
    results = Results(10, tmp_path if in_folder else None)
    await results.open([])
    assert await results.put("a" * 32, b"12345") == []
    assert await results.put("b" * 32, b"67890") == []
    assert await results.put("c" * 32, b"x") == ["a" * 32]
    assert await results.put("d" * 32, b"y" * 11) == ["b" * 32, "c" * 32]
    assert [await results.get(letter * 32) for letter in "abcd"] == [None, None, None, b"y" * 11]
    assert results.size == 11
    if in_folder:
        [kept] = (tmp_path / "results").iterdir()
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600


async def test_a_job_is_forgotten_after_its_time(nursery: Nursery) -> None:
    async with served(nursery, result_seconds=0.05) as client:
        nursery.gate.open(100)
        identity = (await asked(client, {"Idempotency-Key": "k"})).json()["id"]

        async def gone() -> bool:
            return (await client.get(f"/api/jobs/{identity}")).status_code == 404

        async with asyncio.timeout(30):
            while not await gone():
                await asyncio.sleep(0.01)
        assert (await asked(client, {"Idempotency-Key": "k"})).json()["id"] != identity


def crashed(folder: Path) -> Path:
    """What a disk would hold if the server that writes into `folder` were killed now."""
    return Path(shutil.copytree(folder, folder.with_name("crashed")))


async def test_a_restart_keeps_what_was_done_and_says_what_was_lost(tmp_path: Path) -> None:
    before = Nursery()
    async with served(before, jobs_folder=tmp_path / "jobs") as client:
        before.gate.open(5)
        done = (await asked(client, {"Idempotency-Key": "k"})).json()["id"]
        result = (await ended(client, done))["result"]
        lost = (await asked(client, {"Idempotency-Key": "l"}, prompt="a secret")).json()["id"]
        await until(lambda: before.gate.at == "text")
        folder = crashed(tmp_path / "jobs")
    assert all(b"secret" not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert stat.S_IMODE((folder / FILE_NAME).stat().st_mode) == 0o600
    async with served(Nursery(), jobs_folder=folder) as client:
        assert (await client.get(f"/api/jobs/{done}")).json()["result"] == result
        assert (await asked(client, {"Idempotency-Key": "k"})).json()["id"] == done
        job = (await client.get(f"/api/jobs/{lost}")).json()
        assert (job["state"], job["error"]["type"]) == ("failed", "lost_at_restart")
        [(_, name, data)] = parsed((await client.get(f"/api/jobs/{lost}/events")).text)
        assert (name, data["error"]["type"]) == ("error", "lost_at_restart")
        again = await asked(client, {"Idempotency-Key": "l"}, prompt="a secret")
        assert again.json()["id"] != lost


@pytest.mark.parametrize("end", ["killed", "told to end"])
async def test_a_restart_takes_up_what_was_promised(tmp_path: Path, end: str) -> None:
    before, after = Nursery(), Nursery()
    requeue: dict[str, Any] = {"jobs_restart": "requeue"}
    folder = tmp_path / "jobs"
    async with served(before, jobs_folder=folder, **requeue) as client:
        jobs = [(await asked(client, seed=seed)).json()["id"] for seed in range(3)]
        await client.delete(f"/api/jobs/{jobs[1]}")
        await until(lambda: before.gate.at == "text")
        if end == "killed":
            folder = crashed(folder)
    async with served(after, queue_size=1, jobs_folder=folder, **requeue) as client:
        assert (await client.get(f"/api/jobs/{jobs[0]}")).json()["state"] in ("queued", "running")
        await until(lambda: after.gate.at == "text")
        after.gate.open(100)
        for seed in (0, 2):
            job = await ended(client, jobs[seed])
            assert job["result"]["seeds"] == [seed]
        assert (await client.get(f"/api/jobs/{jobs[1]}")).json()["state"] == "cancelled"
    async with served(Nursery(), jobs_folder=folder, **requeue) as client:
        assert (await client.get(f"/api/jobs/{jobs[2]}")).json()["result"]["seeds"] == [2]


async def test_a_job_of_the_last_run_can_be_cancelled_before_it_is_taken_up(tmp_path: Path) -> None:
    before = Nursery()
    folder = tmp_path / "jobs"
    async with served(before, jobs_folder=folder, jobs_restart="requeue") as client:
        identity = (await asked(client)).json()["id"]
    async with client_of(FakeEngine(ready=False), jobs_folder=folder, jobs_restart="requeue") as client:
        for _ in range(2):
            assert (await client.delete(f"/api/jobs/{identity}")).json()["state"] == "cancelled"


async def test_the_table_of_the_version_before_is_read(tmp_path: Path) -> None:
    """It knew of no owner: its jobs are everybody's, as they were."""
    async with client_of(FakeEngine(), jobs_folder=tmp_path) as client:
        done = (await asked(client)).json()["id"]
        await ended(client, done)
    database = sqlite3.connect(tmp_path / FILE_NAME)
    database.execute("ALTER TABLE jobs DROP COLUMN owner")
    database.execute("PRAGMA user_version = 1")
    database.close()
    async with client_of(FakeEngine(), jobs_folder=tmp_path, api_keys=("one",)) as client:
        answer = await client.get(f"/api/jobs/{done}", headers={"Authorization": "Bearer one"})
        assert answer.json()["state"] == "done"


async def test_a_folder_serves_one_server_at_a_time_and_a_strange_file_is_refused(tmp_path: Path) -> None:
    async with served(Nursery(), jobs_folder=tmp_path):
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            await JobStore(tmp_path, patience=0).open()
    database = sqlite3.connect(tmp_path / FILE_NAME)
    database.execute("PRAGMA user_version = 99")
    database.close()
    store = JobStore(tmp_path)
    with pytest.raises(ValueError, match="version 99"):
        await store.open()
    await store.close()


async def test_a_disk_that_fails_refuses_the_job_and_the_server_goes_on(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*args: object, **options: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async with served(nursery, jobs_folder=tmp_path) as client:
        nursery.gate.open(100)
        with monkeypatch.context() as patch:
            patch.setattr(JobStore, "put", full)
            refused = await asked(client)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "storage_failed")
        assert int(refused.headers["retry-after"]) > 0
        lines = [line for line in (await client.get("/metrics")).text.splitlines() if line.startswith(REQUESTS)]
        counted = [line for line in lines if not line.endswith(" 0.0")]
        assert [line.rsplit(" ", 1)[1] for line in counted] == ["1.0"]
        assert 'outcome="storage_failed"' in counted[0]
        good = (await asked(client)).json()["id"]
        assert (await ended(client, good))["state"] == "done"
        with monkeypatch.context() as patch:
            patch.setattr("app.jobs.store._write", raise_full)
            unlucky = await ended(client, (await asked(client)).json()["id"])
        assert (unlucky["state"], unlucky["error"]["type"]) == ("failed", "storage_failed")


def raise_full(*args: object) -> None:
    raise OSError(28, "No space left on device")
