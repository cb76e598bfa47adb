"""`rerender`: a job's request once more, uncached; what may stand beside it, and which jobs there are for whom."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.engine.types import Job
from cache import DeepCache, FirstBlockCache, NoCache
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_engine import until
from tests.app.test_jobs import asked, ended, served

FAST: dict[str, Any] = {
    "prompt": "a secret", "negative_prompt": "rain", "width": 64, "height": 128, "num_images": 2, "batch_size": 2,
    "cfg_scale": 3.0, "sampler": "ddim", "deepcache_enabled": True, "deepcache_preset": "max_speed",
    "deepcache_guidance": "reuse", "cache_forecast": False, "enable_preview": True, "deadline_seconds": 5.0,
}  # fmt: skip
FLUX: dict[str, Any] = {
    "prompt": "a", "model_path": "flux", "hiresfix": True, "flux_enabled": True, "residual_diff_threshold": 0.3,
    "seed": -1,
}  # fmt: skip


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


async def sent(client: httpx.AsyncClient, body: dict[str, Any], path: str = "/api/generate") -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code in (200, 202), response.text
    answer: dict[str, Any] = response.json()
    return answer


def uncached(job: Job, **changes: Any) -> Job:
    """What a rendering of `job` once more is to be, but for its id."""
    return replace(
        job, strategy=NoCache(), deadline_seconds=3600.0, params=replace(job.params, preview=False, **changes)
    )


@pytest.mark.parametrize(("body", "strategy"), [(FAST, DeepCache), (FLUX, FirstBlockCache)])
async def test_a_job_is_drawn_again_without_its_cache(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], strategy: type
) -> None:
    identity = (await sent(client, body, "/api/jobs"))["id"]
    answer = await sent(client, {"rerender": identity})
    first, again = engine.submitted
    assert isinstance(first.strategy, strategy)
    assert again == uncached(replace(first, id=again.id))
    assert (answer["seeds"], answer["cache"]["strategy"]) == (list(first.params.seeds), "none")
    assert not [sentence for sentence in answer["warnings"] if "had no effect" in sentence]
    second = (await sent(client, {"rerender": identity}, "/api/jobs"))["id"]
    await sent(client, {"rerender": second})  # a job as others are
    assert {replace(job, id="") for job in engine.submitted[1:]} == {replace(again, id="")}


async def test_passes_and_the_form_of_the_answer_may_stand_beside_it(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    identity = (await sent(client, {**FAST, "adetailer": True}, "/api/jobs"))["id"]
    first = engine.submitted[0]
    beside = {"hires_fix": True, "adetailer": False, "output_format": "jpeg", "enable_preview": True}
    await sent(client, {"rerender": identity, **beside, "deadline_seconds": 7})
    again = uncached(first, hires_fix=True, adetailer=False)
    again = replace(again, id=engine.submitted[-1].id, output_format="jpeg", deadline_seconds=7.0)
    assert engine.submitted[-1] == replace(again, params=replace(again.params, preview=True))
    winner = first.params.seeds[1]
    picture = await client.post(
        "/api/generate", json={"rerender": identity, "seed": winner}, headers={"Accept": "image/png"}
    )
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
    assert engine.submitted[-1].params.seeds == (winner,)


@pytest.mark.parametrize(
    ("fields", "status", "kind", "field", "words"),
    [
        ({"prompt": "b"}, 422, "incompatible", "prompt", "leave it out beside rerender"),
        ({"width": 64}, 422, "incompatible", "width", "leave it out"),
        ({"deepcache_enabled": True}, 422, "incompatible", "deepcache_enabled", "leave it out"),
        ({"cfg_scale": 7.5}, 422, "incompatible", "guidance_scale", "leave it out"),
        ({"hiresfix": True, "hires_fix": True}, 422, "invalid", "hiresfix", "the same field"),
        ({"seed": 5}, 422, "incompatible", "seed", "picks one of that job's pictures: 7, 8."),
        ({"seed": None}, 422, "incompatible", "seed", "7, 8"),
        ({"seed": 7.0}, 422, "invalid", "seed", "integer"),
        ({"hires_fix": "yes"}, 422, "invalid", "hires_fix", "boolean"),
        ({"upscale": "no such file"}, 422, "invalid", "upscale", "no such file"),
        ({"hires_fx": True}, 422, "invalid", "hires_fx", "'hires_fix'"),
        ({"rerender": 7}, 422, "invalid", "rerender", "a string"),
        ({"rerender": ["a"]}, 422, "invalid", "rerender", "a string"),
        ({"rerender": None}, 422, "invalid", "prompt", "prompt is required"),
        ({"rerender": ""}, 404, "unknown_job", "rerender", "POST /api/jobs"),
        ({"rerender": "0" * 32}, 404, "unknown_job", "rerender", "no such job"),
        ({"rerender": "a\0" * 5000}, 404, "unknown_job", "rerender", "no such job"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/api/generate", "/api/jobs"])
async def test_what_cannot_be_rendered_again_is_said(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    fields: dict[str, Any],
    status: int,
    kind: str,
    field: str,
    words: str,
) -> None:
    identity = (await sent(client, {**FAST, "seed": 7}, "/api/jobs"))["id"]
    refused = await client.post(path, json={"rerender": identity, **fields})
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["field"]) == (status, kind, field), error
    assert words in error["message"]
    assert len(engine.submitted) == 1


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
async def test_other_apis_have_no_such_field(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    refused = await client.post(path, json={"prompt": "a", "rerender": "0" * 32})
    assert (refused.status_code, engine.submitted) == (422, [])


async def test_a_request_that_was_waited_for_is_no_job(client: httpx.AsyncClient) -> None:
    identity = (await sent(client, FAST))["request_id"]
    refused = await client.post("/api/generate", json={"rerender": identity})
    assert (refused.status_code, refused.json()["error"]["type"]) == (404, "unknown_job")


async def test_the_job_of_another_key_and_one_that_is_forgotten_are_not_there(engine: FakeEngine) -> None:
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    async with client_of(engine, api_keys=("one", "two"), result_seconds=0.2) as client:
        identity = (await asked(client, one)).json()["id"]
        refused = await client.post("/api/generate", json={"rerender": identity}, headers=two)
        assert (refused.status_code, refused.json()["error"]["type"]) == (404, "unknown_job")
        while (await client.get(f"/api/jobs/{identity}", headers=one)).status_code != 404:
            pass
        refused = await client.post("/api/generate", json={"rerender": identity}, headers=one)
        assert (refused.status_code, refused.json()["error"]["type"]) == (404, "unknown_job")


async def test_a_job_that_runs_one_that_failed_and_one_that_was_cancelled_can_be_rendered_again(
    nursery: Nursery,
) -> None:
    async with served(nursery) as client:
        running = (await asked(client, deepcache_enabled=True)).json()["id"]
        await until(lambda: nursery.gate.at == "text")
        late = (await asked(client, deadline_seconds=0.01, seed=5)).json()["id"]
        assert (await ended(client, late))["error"]["type"] == "deadline_exceeded"
        cancelled = (await asked(client, seed=6)).json()["id"]
        await client.delete(f"/api/jobs/{cancelled}")
        again = [(await sent(client, {"rerender": one}, "/api/jobs"))["id"] for one in (running, late, cancelled)]
        nursery.gate.open(100)
        results = [(await ended(client, one))["result"] for one in again]
    assert [result["seeds"] for result in results] == [[1], [5], [6]]
    assert {result["cache"]["strategy"] for result in results} == {"none"}


async def test_a_job_with_a_picture_is_to_be_sent_again(client: httpx.AsyncClient) -> None:
    noise = io.BytesIO()
    Image.frombytes("RGB", (200, 200), os.urandom(120_000)).save(noise, "PNG")
    upload = base64.b64encode(noise.getvalue()).decode()
    identity = (await sent(client, {"prompt": "a", "img2img_enabled": True, "img2img_image": upload}, "/api/jobs"))[
        "id"
    ]
    refused = (await client.post("/api/generate", json={"rerender": identity})).json()["error"]
    assert (refused["type"], refused["field"]) == ("unsupported", "rerender")
    assert "Send them again" in refused["message"]


@pytest.mark.parametrize("restart", ["lost", "requeue"])
async def test_after_a_restart_what_is_on_disk_can_be_rendered_again(tmp_path: Path, restart: str) -> None:
    settings: dict[str, Any] = {"jobs_folder": tmp_path / "jobs", "jobs_restart": restart}
    before, after = FakeEngine(), FakeEngine()
    async with client_of(before, **settings) as client:
        done = (await asked(client, seed=None, deepcache_enabled=True)).json()["id"]
        await ended(client, done)
    async with client_of(after, **settings) as client:
        response = await client.post("/api/generate", json={"rerender": done})
    assert response.status_code == 200, response.text
    assert after.submitted[0].params == before.submitted[0].params
