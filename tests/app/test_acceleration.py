"""`attention` and `stable_fast` in a request: passed on where they can run, refused with the remedy where not."""

from __future__ import annotations

import httpx
import pytest

from tests.app.fakes import FakeEngine


@pytest.mark.parametrize(
    ("kernel", "install"), [("sage", "pip install --no-build-isolation sageattention"), ("sparge", "thu-ml/SpargeAttn")]
)
async def test_a_kernel_that_is_not_there_is_refused_with_its_remedy(
    client: httpx.AsyncClient, engine: FakeEngine, kernel: str, install: str
) -> None:
    response = await client.post("/api/generate", json={"prompt": "a", "attention": kernel})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["field"]) == (422, "unsupported", "attention")
    for words in ("not installed", install, "this server's device is cpu", "this model is in float32", "'auto'"):
        assert words in error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize("kernel", ["auto", "sdpa"])
async def test_a_kernel_that_is_there_is_passed_on_and_reported(
    client: httpx.AsyncClient, engine: FakeEngine, kernel: str
) -> None:
    answer = (await client.post("/api/generate", json={"prompt": "a", "attention": kernel})).json()
    assert engine.submitted[0].params.attention == kernel
    assert answer["attention"] == "sdpa"


async def test_compiling_is_passed_on_and_its_time_told_apart(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await client.post("/api/generate", json={"prompt": "a", "stable_fast": True})).json()
    assert engine.submitted[0].params.compiled is True
    assert answer["timings"]["compile_seconds"] == 0.0
    await client.post("/api/generate", json={"prompt": "a"})
    assert engine.submitted[1].params.compiled is False


async def test_compiling_is_refused_where_nothing_can_be_compiled(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    response = await client.post("/api/generate", json={"prompt": "a", "model": "hungry", "stable_fast": True})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["field"]) == (422, "unsupported", "stable_fast")
    assert error["message"] == "No compiler is installed."
    response = await client.post("/api/generate", json={"prompt": "a", "flux_enabled": True, "stable_fast": True})
    assert response.json()["error"]["type"] == "incompatible"
    assert engine.submitted == []


async def test_models_say_what_they_can_run(client: httpx.AsyncClient) -> None:
    models = {row["name"]: row for row in (await client.get("/api/models")).json()["models"]}
    assert models["fine"]["attention"]["sdpa"] is None
    assert "not installed" in models["fine"]["attention"]["sage"]
    assert models["fine"]["compilation"] is None
