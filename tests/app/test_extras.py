"""/sdapi's extras: a picture is enlarged by a job like every other, or refused with a sentence."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.engine.queue import kind_of
from app.engine.types import UpscaleJob
from app.http.apis import a1111_extras
from models.base import Upscaler
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_a1111_api import PICTURE
from tests.app.test_bad_input import JSON, assert_refused


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


async def enlarged(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/sdapi/v1/extra-single-image", json={"image": PICTURE, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_it_is_a_job_without_a_model(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await enlarged(client, upscaler_1="Lanczos", codeformer_weight=0.5, gfpgan_visibility=0, upscaler_2=None)
    assert opened(answer["image"]).size == (128, 128)
    (job,) = engine.submitted
    assert isinstance(job, UpscaleJob)
    assert (job.model, kind_of(job)) == (None, None)
    metrics = (await client.get("/metrics")).text
    assert 'wavespeed_images_total{model="none"} 1.0' in metrics
    assert 'wavespeed_requests_total{model="none",outcome="ok"} 1.0' in metrics


async def test_a_picture_covers_the_size_and_is_cut_to_it(client: httpx.AsyncClient) -> None:
    to = {"resize_mode": 1, "upscaling_resize_w": 100, "upscaling_resize_h": 31, "upscaler_1": "Nearest"}
    answer = await enlarged(client, **to)
    assert opened(answer["image"]).size == (100, 31)
    assert "upscale to: 100x31, Postprocess crop to: 100x31" in answer["html_info"]
    assert opened((await enlarged(client, **to, upscaling_crop=False))["image"]).size == (100, 100)


async def test_without_an_upscaler_it_is_left_alone(client: httpx.AsyncClient) -> None:
    answer = await enlarged(client, upscaler_2="Lanczos", extras_upscaler_2_visibility=1)
    assert opened(answer["image"]).tobytes() == opened(PICTURE).tobytes()
    assert answer["html_info"] == "<p></p>"


async def test_two_are_blended_and_a_file_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()  # no replica: it is another process, which has no such network
    monkeypatch.setattr(a1111_extras.upscaling, "enlarged", lambda work, device, on_tile: work.pictures)
    (tmp_path / "4x.safetensors").touch()
    async with client_of(engine, upscaler_folder=tmp_path) as client:
        await enlarged(client, upscaler_1="Nearest", upscaler_2="4x", extras_upscaler_2_visibility=0.25)
    (job,) = engine.submitted
    assert isinstance(job, UpscaleJob)
    file = Upscaler(name="4x", path=(tmp_path / "4x.safetensors").resolve())
    assert (job.work.upscalers, job.work.blend) == (("Nearest", file), 0.25)


REFUSED = [
    ("", 422, "invalid", "image", "required"),
    ('"image": ""', 422, "invalid", "image", "1 character"),
    ('"image": "/etc/passwd"', 422, "invalid", "image", "not read"),
    ('"image": "http://169.254.169.254/"', 422, "invalid", "image", "nothing is fetched"),
    ('"image": "AAAA"', 422, "invalid", "image", "no picture"),
    (f'"image": "{PICTURE}", "upscaler_1": "R-ESRGAN 4x+"', 422, "invalid", "upscaler_1", "no upscaler"),
    (f'"image": "{PICTURE}", "upscaler_2": "../x"', 422, "invalid", "upscaler_2", "no upscaler"),
    (f'"image": "{PICTURE}", "gfpgan_visibility": 0.5', 422, "unsupported", "gfpgan_visibility", "adetailer"),
    (f'"image": "{PICTURE}", "codeformer_visibility": 1', 422, "unsupported", "codeformer_visibility", "adetailer"),
    (f'"image": "{PICTURE}", "show_extras_results": false', 422, "unsupported", "show_extras_results", "answer"),
    (f'"image": "{PICTURE}", "upscaling_resize": 1e999', 422, "invalid", "upscaling_resize", "finite"),
    (f'"image": "{PICTURE}", "upscaling_resize": 0', 422, "invalid", "upscaling_resize", "greater than 0"),
    (f'"image": "{PICTURE}", "upscaling_resize_w": 8193', 422, "invalid", "upscaling_resize_w", "8192"),
    (f'"image": "{PICTURE}", "resize_mode": 2', 422, "invalid", "resize_mode", "0 or 1"),
    (f'"image": "{PICTURE}", "scale": 2', 422, "invalid", "scale", "not permitted"),
]


@pytest.mark.parametrize(("members", "status", "kind", "field", "words"), REFUSED)
async def test_what_cannot_be_done_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, members: str, status: int, kind: str, field: str, words: str
) -> None:
    response = await client.post("/sdapi/v1/extra-single-image", content=f"{{{members}}}", headers=JSON)
    assert_refused(response, status, kind, field, words)
    assert engine.submitted == []


async def test_pictures_together_have_a_bound(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {
        "imageList": [{"data": PICTURE, "name": "a.png"}, {"data": PICTURE, "name": "b.png"}],
        "upscaler_1": "Nearest",
    }
    there = "/sdapi/v1/extra-batch-images"
    answer = (await client.post(there, json=two)).json()
    assert [opened(picture).size for picture in answer["images"]] == [(128, 128)] * 2
    monkeypatch.setattr(a1111_extras.upscaling, "MOST_PIXELS", 2 * 128**2 - 1)
    assert_refused(await client.post(there, json=two), 422, "invalid", "upscaling_resize", "32768 pixels")
    monkeypatch.setattr(a1111_extras, "MOST_PIXELS", 2 * 64**2 - 1)
    assert_refused(await client.post(there, json=two), 413, "picture_too_large", "imageList.1.data", "pixels")
    assert_refused(await client.post(there, json={"imageList": []}), 422, "invalid", "imageList", "1 item")
    assert len(engine.submitted) == 1


async def test_a_full_queue_is_told_before_a_picture_is_decoded() -> None:
    engine = FakeEngine()
    engine.capacity = 0
    async with client_of(engine) as client:
        response = await client.post("/sdapi/v1/extra-single-image", json={"image": "damaged"})
    assert response.status_code == 429
