"""What uploads cost others: memory that is given back, threads that are theirs, room that is asked for first."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from app import images
from app.http import pictures
from app.http.request import Uploads
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_engine import until
from tests.app.test_jobs import BODY, served
from tests.app.test_passes import upload

UPLOAD = {**BODY, "img2img_enabled": True}


def picture(side: int) -> str:
    """A small file of many pixels."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class Remembering:
    """Keeps a weak reference to each picture that is decoded."""

    def __init__(self, read: Callable[..., Image.Image]) -> None:
        self._read = read
        self.seen: list[weakref.ref[Image.Image]] = []

    def __call__(self, *args: Any, **options: Any) -> Image.Image:
        decoded = self._read(*args, **options)
        self.seen.append(weakref.ref(decoded))
        return decoded


async def test_what_waits_is_no_larger_than_what_is_drawn_and_is_gone_when_it_is_done(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the help of the garbage collector, which may come late."""
    decoded, shrunk = Remembering(images.read_picture), Remembering(pictures.fit)
    monkeypatch.setattr(pictures, "read_picture", decoded)
    monkeypatch.setattr(pictures, "fit", shrunk)
    gc.collect()
    gc.disable()
    try:
        async with served(nursery) as client:
            body = {**UPLOAD, "img2img_image": picture(2048), "steps": 2, "img2img_denoise": 1.0}
            waiting = asyncio.create_task(client.post("/api/generate", json=body))
            kept = (await client.post("/api/jobs", json=body)).json()["id"]
            await until(lambda: len(shrunk.seen) == 2)
            assert [one() for one in decoded.seen] == [None, None]
            assert {one().size for one in shrunk.seen if one() is not None} == {(64, 64)}  # type: ignore[union-attr]
            nursery.gate.open(100)
            assert (await waiting).status_code == 200
            await client.get(f"/api/jobs/{kept}/events")
            assert (await client.post("/api/generate", json=BODY)).status_code == 200
            await until(lambda: all(one() is None for one in shrunk.seen))
    finally:
        gc.enable()


async def test_a_full_queue_is_said_before_the_picture_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> Image.Image:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(pictures, "read_picture", never)
    async with client_of(FakeEngine(capacity=0)) as client:
        refused = await client.post("/api/generate", json={**UPLOAD, "img2img_image": upload()})
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "queue_full")


async def test_small_requests_need_no_thread_that_uploads_have(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many pictures are being decoded: the orders to the worker and the answers have threads of their own."""
    release, decoding = threading.Event(), threading.Semaphore(0)

    def slow(*args: Any, **options: Any) -> Image.Image:
        decoding.release()
        release.wait(60)
        return images.read_picture(*args, **options)

    monkeypatch.setattr(pictures, "read_picture", slow)
    async with served(nursery) as client:
        nursery.gate.open(1000)
        body = {**UPLOAD, "img2img_image": upload()}
        uploads = [asyncio.create_task(client.post("/api/generate", json=body)) for _ in range(40)]
        await until(lambda: decoding.acquire(blocking=False))
        for _ in range(3):
            assert (await client.post("/api/generate", json=BODY)).status_code == 200
        assert not any(one.done() for one in uploads)
        release.set()
        assert {one.status_code for one in await asyncio.gather(*uploads)} == {200}
    assert len(nursery.children) == 1


async def test_large_bodies_wait_for_room_and_small_ones_do_not() -> None:
    uploads = Uploads(100)
    order: list[str] = []

    async def take(name: str, size: int, hold: asyncio.Event) -> None:
        async with uploads.taking(size):
            order.append(name)
            await hold.wait()

    first, second = asyncio.Event(), asyncio.Event()
    tasks = [asyncio.create_task(take("a", 60, first)), asyncio.create_task(take("b", 60, second))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == ["a"]
    tasks[1].cancel()  # who gives up takes nothing with it
    await asyncio.gather(tasks[1], return_exceptions=True)
    tasks.append(asyncio.create_task(take("c", 100, second)))
    await asyncio.sleep(0)
    first.set()
    await tasks[0]
    second.set()
    await tasks[2]
    assert order == ["a", "c"]


async def test_a_data_url_may_call_jpeg_jpg(client: httpx.AsyncClient) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    text = "data:image/jpg;base64," + base64.b64encode(file.getvalue()).decode()
    assert (await client.post("/api/generate", json={**UPLOAD, "img2img_image": text})).status_code == 200
