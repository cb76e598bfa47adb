"""The app over the local engine and real workers: killed worker, client that leaves, counters that agree."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from app.engine.supervisor import LocalEngine
from app.http.app import create_app
from app.log import logging_to
from app.settings import Settings
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import fake_runner
from tests.app.test_engine import LONG, until


def local_engine(**options: Any) -> LocalEngine:
    return LocalEngine(fake_runner, ["cpu"], backoff=(0.01, 0.1), **options)


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/api/generate", json={"prompt": "a", "width": 64, "height": 64, "seed": 1, **body})


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Prometheus text as (name, labels) → value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_worker_killed_during_a_request_takes_nothing_with_it() -> None:
    engine = local_engine()
    async with client_of(engine) as client:
        await until(lambda: engine.status().ready)
        worker = engine.status().devices[0].pid
        assert worker is not None
        request = asyncio.create_task(post(client, model="slow", steps=50))
        await until(lambda: engine.status().running == 1)
        os.kill(worker, signal.SIGKILL)
        assert (await request).status_code == 200
        assert (await client.get("/livez")).status_code == 200
        assert (await post(client)).status_code == 200

        lost = await post(client, model="dies")
        assert (lost.status_code, lost.json()["error"]["type"]) == (503, "worker_lost")
        assert int(lost.headers["retry-after"]) > 0
        await until(lambda: engine.status().ready)
        assert (await client.get("/readyz")).status_code == 200
        assert (await post(client)).status_code == 200


async def test_a_failing_model_is_a_500_whose_cause_stays_in_the_log(tmp_path: Path) -> None:
    engine = local_engine()
    with logging_to(tmp_path, "INFO") as path:
        async with client_of(engine) as client:
            await until(lambda: engine.status().ready)
            response = await post(client, model="raises")
            memory = await post(client, model="hungry")
    assert (response.status_code, response.json()["error"]["type"]) == (500, "generation_failed")
    assert "secret" not in response.text
    assert (memory.status_code, memory.json()["error"]["type"]) == (503, "out_of_memory")
    assert "batch_size" in memory.json()["error"]["message"]
    identity = response.headers["x-request-id"]
    assert any("secret detail" in line and identity in line for line in path.read_text().splitlines())


async def test_a_full_queue_turns_the_next_one_away(nursery: Nursery) -> None:
    engine = nursery.engine(queue_size=1)
    async with client_of(engine) as client:
        await until(lambda: engine.status().ready)
        requests = [asyncio.create_task(post(client)) for _ in range(2)]
        await until(lambda: engine.status().running == 1 and engine.status().pending == 1)
        refused = await post(client)
        assert (await client.get("/api/telemetry")).json()["pending_count"] == 1
        assert samples((await client.get("/metrics")).text)["wavespeed_queue_depth", frozenset()] == 1
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        nursery.gate.open(100)
        assert [response.status_code for response in await asyncio.gather(*requests)] == [200, 200]


async def test_the_counters_the_log_and_the_answers_agree(tmp_path: Path) -> None:
    engine = local_engine()
    with logging_to(tmp_path, "DEBUG") as path:
        async with client_of(engine) as client:
            await until(lambda: engine.status().ready)
            first = (await post(client, deepcache_enabled=True)).json()
            second = (await post(client, deepcache_enabled=True, steps=4, num_images=3, batch_size=2)).json()
            flux = (await post(client, flux_enabled=True)).json()
            plain = (await post(client, steps=2)).json()
            refused = await post(client, width=65)
            telemetry = (await client.get("/api/telemetry")).json()
            metrics = samples((await client.get("/metrics")).text)

    assert (first["cache"]["computed"], first["cache"]["reused"]) == (7, 13)
    assert (second["cache"]["computed"], second["cache"]["reused"]) == (4, 4)
    assert (flux["cache"]["computed"], flux["cache"]["reused"]) == (2, 2)
    assert (plain["cache"]["computed"], plain["cache"]["reused"]) == (2, 0)

    deepcache = telemetry["cache"]["deepcache"]
    assert deepcache["requests"] == 2
    assert (deepcache["computed_steps"], deepcache["reused_steps"]) == (11, 17)
    assert deepcache["hit_rate"] == deepcache["recent_hit_rate"] == round(17 / 28, 4)
    assert deepcache["last"]["hit_rate"] == 0.5
    assert telemetry["cache"]["fbcache"]["requests"] == 1
    assert (telemetry["requests_processed"], telemetry["images_produced"], telemetry["batches_processed"]) == (4, 6, 5)
    assert telemetry["worker_running"] is True
    assert telemetry["loaded_models"] == ["fine", "flux"]
    assert telemetry["devices"][0]["kind"] == "cpu"
    memory = telemetry["memory_info"]
    assert memory.pop("system_ram_mb") > 10
    assert set(memory) == {
        "total_vram", "used_vram", "free_vram", "vram_allocated_mb", "vram_reserved_mb", "vram_peak_mb",
    }  # fmt: skip
    assert not any(memory.values())
    assert telemetry["uptime_seconds"] > 0
    assert telemetry["server_start_ts"] > 1.7e9

    def steps(model: str, strategy: str, outcome: str) -> float:
        labels = frozenset({"model": model, "strategy": strategy, "outcome": outcome}.items())
        return metrics["wavespeed_cache_steps_total", labels]

    def requests(model: str, outcome: str) -> float:
        return metrics["wavespeed_requests_total", frozenset({"model": model, "outcome": outcome}.items())]

    assert (steps("fine", "deepcache", "computed"), steps("fine", "deepcache", "reused")) == (11, 17)
    assert (steps("flux", "first_block", "computed"), steps("flux", "first_block", "reused")) == (2, 2)
    assert (steps("fine", "none", "computed"), steps("fine", "none", "reused")) == (2, 0)
    assert (requests("fine", "ok"), requests("flux", "ok"), requests("none", "invalid")) == (3, 1, 1)
    assert metrics["wavespeed_cache_bytes", frozenset({("strategy", "deepcache")})] == 2000
    assert metrics["wavespeed_model_loaded", frozenset({("model", "fine")})] == 1
    assert metrics["wavespeed_model_loaded", frozenset({("model", "slow")})] == 0
    assert metrics["wavespeed_gpu_memory_total_bytes", frozenset({("device", "cpu")})] == 0
    assert metrics["wavespeed_queue_wait_seconds_count", frozenset()] == 4
    generation = frozenset({("model", "fine"), ("strategy", "deepcache")})
    assert metrics["wavespeed_generation_seconds_count", generation] == 2

    lines = path.read_text().splitlines()
    mine = [line for line in lines if f"request={first['request_id']} " in line]
    summary = [line for line in mine if " INFO " in line and re.search("deepcache|cache", line, re.IGNORECASE)]
    assert len(summary) == 1
    assert re.search(r"cache strategy=deepcache .*computed=7 reused=13 hit_rate=0\.65", summary[0])
    decisions = [match[1] for line in mine if " DEBUG " in line and (match := re.search(r"decision=(\w+)", line))]
    assert "".join(decisions) == first["cache"]["decisions"]
    assert any(f"request={refused.headers['x-request-id']} " in line and "field=width" in line for line in lines)
    assert all(re.match(r"\S+ [A-Z]+ +request=\S+ ", line) for line in lines)


@asynccontextmanager
async def listening(engine: LocalEngine) -> AsyncIterator[int]:
    """The app under uvicorn on a free port of this machine, which it yields."""
    settings = Settings(_env_file=None)  # type: ignore[call-arg]
    config = uvicorn.Config(create_app(settings, engine), port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started and engine.status().ready)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


@pytest.mark.parametrize("when", ["queued", "running"])
async def test_a_client_that_leaves_frees_its_place(when: str) -> None:
    engine = local_engine()
    async with listening(engine) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        blocker = asyncio.create_task(post(client, model="slow", steps=100)) if when == "queued" else None
        if blocker is not None:
            await until(lambda: engine.status().running == 1)
        body = b'{"prompt": "a", "model": "slow", "steps": 150, "num_images": 10}'
        head = f"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            await until(lambda: engine.status().pending == 1 if blocker else engine.status().running == 1)
            worker = engine.status().devices[0].pid
        finally:
            writer.close()
            await writer.wait_closed()
        await until(lambda: engine.status().pending == 0 if blocker else engine.status().running == 0)
        if blocker is not None:
            assert not blocker.done()
            assert (await blocker).status_code == 200
        assert (await post(client)).status_code == 200
        assert engine.status().devices[0].pid == worker
        counted = samples((await client.get("/metrics")).text)
    labels = frozenset({("model", "slow"), ("outcome", "cancelled")})
    assert counted["wavespeed_requests_total", labels] == 1


async def test_a_request_that_is_dropped_inside_the_server_is_cancelled_too() -> None:
    engine = local_engine()
    async with client_of(engine) as client:
        await until(lambda: engine.status().ready)
        request = asyncio.create_task(post(client, model="slow", steps=LONG // 100))
        await until(lambda: engine.status().running == 1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(lambda: engine.status().running == 0)
        assert (await post(client)).status_code == 200
