"""A caller's jobs as a list, what is kept of their requests, and how they are forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.jobs.record import JobRecord
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_engine import until
from tests.app.test_jobs import BODY, asked, ended, served


async def test_a_caller_s_jobs_are_listed_newest_first_and_nobody_else_s(engine: FakeEngine) -> None:
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    async with client_of(engine, api_keys=("one", "two")) as client:

        async def listed(headers: dict[str, str], **query: Any) -> tuple[list[str], bool]:
            answer = (await client.get("/api/jobs", headers=headers, params=query)).json()
            return [job["id"] for job in answer["jobs"]], answer["more"]

        ids = [(await asked(client, one, prompt=f"number {number}")).json()["id"] for number in range(5)]
        await asked(client, two)
        await client.post("/api/generate", json=BODY, headers=one)  # was waited for, so it is no job
        newest = ids[::-1]
        assert await listed(one) == (newest, False)
        assert await listed(one, limit=2) == (newest[:2], True)
        assert await listed(one, limit=2, before=newest[1]) == (newest[2:4], True)
        assert await listed(one, before=newest[3]) == (newest[4:], False)
        assert await listed(one, before=newest[4]) == ([], False)
        assert await listed(one, before="no such job") == ([], False)
        [first] = (await client.get("/api/jobs", headers=one, params={"limit": 1})).json()["jobs"]
        assert first["request"]["prompt"] == "number 4"
        assert "result" not in first
        for query in ({"limit": 0}, {"limit": 201}, {"limit": "a"}):
            assert (await client.get("/api/jobs", headers=one, params=query)).status_code == 422


async def test_a_job_is_forgotten_when_asked_with_its_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    async with client_of(FakeEngine(), jobs_folder=folder) as client:
        kept, gone = [(await asked(client)).json()["id"] for _ in range(2)]
        for identity in (kept, gone):
            await ended(client, identity)
        assert (await client.delete(f"/api/jobs/{gone}/result")).status_code == 204
        assert (await client.delete(f"/api/jobs/{gone}/result")).status_code == 404
        assert (await client.get(f"/api/jobs/{gone}")).status_code == 404
        assert [path.name for path in (folder / "results").iterdir()] == [kept]
    async with client_of(FakeEngine(), jobs_folder=folder) as client:
        [job] = (await client.get("/api/jobs")).json()["jobs"]
        assert (job["id"], job["request"]["prompt"]) == (kept, "a")  # what was asked outlives a restart


async def test_a_job_that_is_forgotten_while_it_runs_is_cancelled(nursery: Nursery) -> None:
    async with served(nursery) as client:
        running = (await asked(client)).json()["id"]
        await until(lambda: nursery.gate.at == "text")
        assert (await client.delete(f"/api/jobs/{running}/result")).status_code == 204
        assert (await client.get(f"/api/jobs/{running}")).status_code == 404
        nursery.gate.open(100)
        assert (await client.get("/api/jobs")).json()["jobs"] == []
        assert (await ended(client, (await asked(client)).json()["id"]))["state"] == "done"


def test_of_a_long_request_what_is_not_too_long_is_kept() -> None:
    record = JobRecord(id="a", request={"prompt": "p" * 10_000, "img2img_image": "x" * 70_000, "mask": "y" * 50_000})
    record.forget_upload()
    assert record.request == {"prompt": "p" * 10_000, "mask": "y" * 50_000, "left_out": ["img2img_image"]}
    before = record.request
    record.forget_upload()
    assert record.request == before
