"""Clients that leave: whatever the worker is doing for them, it is free for the next one within one step."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from app.engine.types import WorkerState
from tests.app.children import Nursery
from tests.app.test_engine import device, until
from tests.app.test_server import listening, post

BODY = json.dumps({"prompt": "a", "width": 64, "height": 64, "steps": 5}).encode()
HEAD = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n"
REQUEST = HEAD.encode() + b"Content-Type: application/json\r\n\r\n" + BODY


@pytest.mark.parametrize("stage", ["queued", "text", "step 0", "step 3", "decode"])
async def test_a_client_that_leaves_frees_its_place_within_one_step(stage: str) -> None:
    nursery = Nursery()
    engine = nursery.engine()
    async with listening(engine) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        blocking = asyncio.create_task(post(client, steps=1)) if stage == "queued" else None
        if blocking is not None:
            await until(lambda: nursery.gate.at == "text")
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        if stage == "queued":
            await until(lambda: engine.status().pending == 1)
        else:
            await nursery.reach(stage)
        done = len(nursery.gate.passed)
        writer.close()
        await writer.wait_closed()
        if blocking is not None:
            await until(lambda: engine.status().pending == 0)
            nursery.gate.open(3)
            assert (await blocking).status_code == 200
        else:
            await until(nursery.child.has_orders)  # the cancel
            nursery.gate.open(3)  # at most the rest of the stage, a step and the decoding of what has no steps left
            await until(lambda: device(engine).state is WorkerState.READY)
            nursery.gate.close()
            mine = nursery.gate.passed[done:]
            assert sum(thing.startswith("step") for thing in mine) <= 1
        nursery.gate.close()
        nursery.gate.open(100)
        assert (await post(client, steps=1)).status_code == 200
    assert len(nursery.children) == 1
