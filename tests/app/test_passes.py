"""From a request's fields to passes, uploads that are none, and the report of several runs."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.engine.runner import summarise, summarise_stages
from cache import CacheReport
from models.base import GenerationParams, Multiscale, StageReport
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_bad_input import assert_refused


def upload(width: int = 96, height: int = 64) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def bomb() -> str:
    """A PNG whose header promises 50 000 × 50 000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


async def drawn(client: httpx.AsyncClient, engine: FakeEngine, **fields: Any) -> tuple[GenerationParams, list[str]]:
    response = await client.post("/api/generate", json={"prompt": "a", "steps": 10, **fields})
    assert response.status_code == 200, response.text
    return engine.submitted[-1].params, response.json()["warnings"]


HIRES = {"enable_hr": True, "hr_upscaler": "Lanczos", "hr_scale": 2, "denoising_strength": 0.5, "width": 256}


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        ("/api/generate", {"img2img_enabled": True, "img2img_image": upload()}, "img2img_enabled"),
        ("/api/generate", {"img2img_enabled": True, "img2img_image": upload(), "mask": upload()}, "img2img_enabled"),
        ("/api/generate", {"hires_fix": True}, "hires_fix"),
        ("/api/generate", {"adetailer": True}, "adetailer"),
        ("/sdapi/v1/img2img", {"init_images": [upload()]}, "img2img_enabled"),
        ("/sdapi/v1/txt2img", HIRES, "hires_fix"),
    ],
    ids=["img2img", "mask", "hires_fix", "adetailer", "A1111 img2img", "A1111 hires_fix"],
)
async def test_a_family_that_draws_from_noise_alone_refuses_what_draws_over(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any], field: str
) -> None:
    known = engine.models.models
    engine.models = replace(engine.models, models={**known, "fine": replace(known["fine"], family="flux2-klein")})
    answer = await client.post(path, json={"prompt": "a", **fields})
    assert_refused(answer, 422, "incompatible", field, f"Leave {field} out, or take a model of another family")
    assert engine.submitted == []
    assert (await client.post("/api/generate", json={"prompt": "a"})).status_code == 200


async def test_fields_become_passes(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    params, warnings = await drawn(
        client,
        engine,
        img2img_enabled=True,
        img2img_image="data:image/png;base64," + upload(),
        img2img_denoise=0.5,
        hires_fix=True,
        adetailer=True,
        multiscale_enabled=True,
        multiscale_factor=0.75,
        multiscale_fullres_start=1,
        multiscale_fullres_end=2,
        multiscale_intermittent=False,
        enable_preview=True,
    )
    assert params.img2img is not None
    assert (params.img2img.picture.size, params.img2img.denoise) == (
        (512, 512),
        0.5,
    )  # cut on arrival
    assert params.img2img.picture.getpixel((0, 0)) == (10, 20, 30)
    assert (params.hires_fix, params.adetailer, params.preview) == (True, True, True)
    assert params.multiscale == Multiscale(factor=0.75, fullres_start=1, fullres_end=2, intermittent=False)
    assert warnings == ["The fake says so."]
    params, _ = await drawn(client, engine)
    assert params.img2img is params.multiscale is None
    assert (params.hires_fix, params.adetailer, params.preview) == (False, False, False)


async def test_the_operator_s_face_detector_goes_with_adetailer(engine: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "face.onnx"
    path.write_bytes(b"")
    async with client_of(engine, face_detector=str(path)) as client:
        assert (await drawn(client, engine, adetailer=True))[0].face_detector == path
        assert (await drawn(client, engine))[0].face_detector is None


async def test_a_field_without_its_switch_is_said(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    params, warnings = await drawn(client, engine, img2img_image="no picture", multiscale_factor=0.25)
    assert params.img2img is params.multiscale is None
    assert warnings[:2] == [
        "img2img_image had no effect: img2img_enabled is not true.",
        "multiscale_factor had no effect: multiscale_enabled is not true.",
    ]


@pytest.mark.parametrize(
    ("fields", "status", "field", "words"),
    [
        ({}, 422, "img2img_image", "needs a picture"),
        ({"img2img_image": "/etc/passwd"}, 422, "img2img_image", "not base64"),
        ({"img2img_image": "file:///etc/passwd"}, 422, "img2img_image", "not base64"),
        ({"img2img_image": "https://example.org/a.png"}, 422, "img2img_image", "not base64"),
        ({"img2img_image": base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()}, 422,
         "img2img_image", "no picture"),
        ({"img2img_image": upload(1, 1)}, 422, "img2img_image", "less than 32"),
        ({"img2img_image": upload(500, 31)}, 422, "img2img_image", "less than 32"),
        ({"img2img_image": bomb()}, 413, "img2img_image", "pixels"),
        ({"img2img_image": upload(), "img2img_denoise": 0.09}, 422, "img2img_denoise", "at least 0.1"),
        ({"img2img_image": upload(), "img2img_denoise": 0.3, "steps": 3}, 422, "img2img_denoise", "at least 0.334"),
    ],
    ids=["none", "path", "file-url", "url", "svg", "1x1", "flat", "bomb", "no-step", "no-step-of-three"],
)  # fmt: skip
async def test_an_upload_that_cannot_be_drawn_over_is_refused_and_the_next_request_is_not(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], status: int, field: str, words: str
) -> None:
    response = await client.post("/api/generate", json={"prompt": "a", "steps": 10, "img2img_enabled": True, **fields})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["field"] == field
    assert words in error["message"]
    assert engine.submitted == []
    params, _ = await drawn(client, engine, img2img_enabled=True, img2img_image=upload())
    assert params.img2img is not None


def report_of(name: str, decisions: str, side: int, **details: Any) -> StageReport:
    cache = CacheReport("deepcache", {"interval": 3}, decisions, reuse_cost=0.25, cache_bytes=len(decisions))
    return StageReport(name=name, cache=cache, steps=len(decisions), width=side, height=side, **details)


def test_a_plain_run_is_reported_as_ever() -> None:
    runs = [report_of("base", "CRR", 64), report_of("base", "CR", 64)]
    assert summarise_stages(runs) == summarise([run.cache for run in runs])
    with pytest.raises(ValueError, match="report"):
        summarise_stages([])


def test_passes_are_summed_and_reported_apart() -> None:
    """Two batches of a base pass with small steps and of a second one of twice the side."""
    base = {"sizes": "FSS", "small_share": 0.5}
    runs = [report_of("base", "CCR", 64, **base), report_of("hires_fix", "CR", 128)] * 2
    summary = summarise_stages(runs)
    assert (summary["computed"], summary["reused"], summary["decisions"]) == (6, 4, "CCR CR CCR CR")
    passes: Any = summary["passes"]
    assert [row["name"] for row in passes] == ["base", "hires_fix"]
    assert passes[0] == {
        "name": "base", "runs": 2, "width": 64, "height": 64, "steps": 3, "computed": 4, "reused": 2,
        "hit_rate": 0.3333, "decisions": "CCR CCR", "predicted_speedup": round(2 / (1.5 + 0.5 / 4), 3),
        "cache_bytes": 3, "sizes": "FSS FSS", "small_share": 0.5,
    }  # fmt: skip
    # In calls of the base pass: 1 + ½ + ½ and 4 + 4; a reused one costs a quarter.
    assert summary["predicted_speedup"] == round((2 + 8) / (1.5 + 0.125 + 4 + 1), 3)
    json.dumps(summary, allow_nan=False)


def test_a_call_with_text_alone_counts_half() -> None:
    """Reused with guidance `reuse`, a call of both halves runs one of them; one with text alone has none to spare."""
    for kind, single in (("full", 0.25), ("reuse", 0.5)):
        run = report_of("base", "CRCR", 64, halves="BBTT")
        run.cache.settings["guidance"] = kind
        passes: Any = summarise_stages([run])["passes"]
        assert passes[0]["halves"] == "BBTT"
        assert passes[0]["predicted_speedup"] == round((1 + 1 + 0.5 + 0.5) / (1 + 0.25 + 0.5 + 0.5 * single), 3)
