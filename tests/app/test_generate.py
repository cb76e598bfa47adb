"""POST /api/generate: what a good request becomes, and what its answer holds."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import pytest
from PIL import Image

from app.engine.types import Job
from app.http.render import accepted_image
from app.http.schemas import EXAMPLE
from cache import DeepCache, FirstBlockCache, NoCache
from tests.app.conftest import client_of
from tests.app.fakes import PLAN, FakeEngine


async def answer(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/api/generate", json={"prompt": "a", **body})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


async def test_the_documents_request_is_answered_as_the_contract_says(client: httpx.AsyncClient) -> None:
    response = await client.post("/api/generate", json=EXAMPLE)
    assert response.status_code == 200
    body = response.json()
    assert set(body) == {
        "image", "request_id", "model", "seeds", "width", "height", "steps", "warnings", "timings", "cache",
        "attention", "reused_run",
    }  # fmt: skip
    image = picture(body["image"])
    assert (image.format, image.size) == ("PNG", (768, 512))
    assert (body["model"], body["width"], body["height"], body["steps"]) == ("fine", 768, 512, 20)
    assert body["request_id"] == response.headers["x-request-id"]
    assert set(body["timings"]) == {
        "queue_seconds", "text_seconds", "denoise_seconds", "decode_seconds", "total_seconds",
        "compile_seconds",
    }  # fmt: skip
    assert body["warnings"] == ["The fake says so."]
    assert body["cache"] == {
        "strategy": "deepcache",
        "computed": 7,
        "reused": 13,
        "hit_rate": 0.65,
        "decisions": "CRRCRRCRRCRRCRRCRRCR",
        "interval": 3,
        "depth": 2,
        "branch": 1,
        "reuse_cost": 0.25,
        "predicted_speedup": round(20 / (7 + 13 * 0.25), 3),
        "cache_bytes": 1000,
    }


@pytest.mark.parametrize(
    ("body", "strategy"),
    [
        ({}, NoCache()),
        ({"deepcache_enabled": False}, NoCache()),
        ({"deepcache_enabled": True}, DeepCache(3, 2, 0, 1000)),
        ({"deepcache_enabled": True, "deepcache_interval": 1, "deepcache_depth": 12}, DeepCache(1, 12, 0, 1000)),
        ({"deepcache_enabled": True, "deepcache_start_step": 5, "deepcache_end_step": 5}, DeepCache(3, 2, 5, 5)),
        ({"deepcache_enabled": True, "deepcache_preset": "balanced"}, DeepCache(3, 2, 0, 1000)),
        ({"deepcache_enabled": True, "deepcache_preset": "max_speed"}, DeepCache(5, 3, 0, 1000)),
        ({"deepcache_enabled": True, "deepcache_preset": "max_quality"}, DeepCache(2, 1, 0, 1000)),
        ({"deepcache_enabled": True, "deepcache_preset": "partial"}, DeepCache(3, 2, 200, 800)),
        (
            {"deepcache_enabled": True, "deepcache_preset": "partial", "cache_forecast": False},
            DeepCache(3, 2, 200, 800, forecast=False),
        ),
        ({"deepcache_enabled": True, "cache_forecast": True}, DeepCache()),
        ({"deepcache_enabled": True, "deepcache_schedule": "uniform"}, DeepCache(schedule="uniform")),
        ({"deepcache_enabled": True, "deepcache_schedule": "auto"}, DeepCache(schedule="auto")),
        ({"deepcache_enabled": True, "deepcache_guidance": "reuse"}, DeepCache(guidance="reuse")),
        ({"deepcache_enabled": True, "deepcache_guidance": "full"}, DeepCache(guidance="full")),
        ({"flux_enabled": True}, FirstBlockCache(0.05, None)),
        ({"flux_enabled": True, "cache_forecast": True}, FirstBlockCache()),
        ({"flux_enabled": True, "cache_forecast": False}, FirstBlockCache(forecast=False)),
        ({"model": "flux"}, FirstBlockCache(0.05, None)),
        ({"flux_enabled": True, "residual_diff_threshold": 0}, FirstBlockCache(0.0, None)),
        ({"flux_enabled": True, "fbcache_threshold": 1, "fbcache_max_consecutive": 3}, FirstBlockCache(1.0, 3)),
        ({"flux_enabled": True, "fbcache_enabled": False}, NoCache()),
    ],
)
async def test_fields_choose_the_strategy(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], strategy: object
) -> None:
    await answer(client, **body)
    assert engine.submitted[0].strategy == strategy


async def test_defaults_are_the_models(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await answer(client)
    await answer(client, flux_enabled=True)
    await answer(client, steps=7, cfg_scale=0)
    chosen = [(job.model, job.params.steps, job.params.guidance_scale) for job in engine.submitted]
    assert chosen == [("fine", 20, 7.5), ("flux", 4, 3.5), ("fine", 7, 0)]


async def test_negative_zero_is_zero(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await answer(client, guidance_scale=-0.0)
    assert str(engine.submitted[0].params.guidance_scale) == "0.0"


async def test_seeds_count_up_and_wrap(client: httpx.AsyncClient) -> None:
    body = await answer(client, seed=2**32 - 2, num_images=3)
    assert body["seeds"] == [2**32 - 2, 2**32 - 1, 0]


@pytest.mark.parametrize("unset", [{}, {"seed": -1}, {"seed": None}])
async def test_an_unset_seed_is_drawn_and_told(client: httpx.AsyncClient, unset: dict[str, Any]) -> None:
    seeds = {(await answer(client, **unset))["seeds"][0] for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


async def test_several_images_in_several_batches_make_one_report(client: httpx.AsyncClient) -> None:
    body = await answer(client, num_images=3, batch_size=2, steps=4, seed=10, deepcache_enabled=True)
    assert "image" not in body
    assert [picture(image).getpixel((0, 0))[0] for image in body["images"]] == [10, 11, 12]  # type: ignore[index]
    cache = body["cache"]
    assert (cache["computed"], cache["reused"], cache["decisions"]) == (4, 4, "CRRC CRRC")
    assert cache["cache_bytes"] == 2000
    assert body["warnings"] == ["The fake says so."]


async def test_the_operators_batch_limit_is_kept_and_said(engine: FakeEngine) -> None:
    async with client_of(engine, max_batch_size=2) as client:
        lowered = await answer(client, num_images=4, batch_size=4)
        not_reached = await answer(client, num_images=2, batch_size=4)
    assert [job.params.batch_size for job in engine.submitted] == [2, 2]
    assert "at most 2" in lowered["warnings"][0]
    assert not_reached["warnings"] == ["The fake says so."]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"deepcache_interval": 3}, "deepcache_interval"),
        ({"deepcache_preset": "partial"}, "deepcache_preset"),
        ({"cache_forecast": True}, "cache_forecast"),
        ({"flux_enabled": True, "fbcache_enabled": False, "cache_forecast": False}, "cache_forecast"),
        ({"flux_enabled": True, "deepcache_depth": 1}, "deepcache_depth"),
        ({"fbcache_threshold": 0.1}, "fbcache_threshold"),
        ({"residual_diff_threshold": 0.1, "deepcache_enabled": True}, "fbcache_threshold"),
        ({"flux_enabled": True, "fbcache_enabled": False, "fbcache_max_consecutive": 2}, "fbcache_max_consecutive"),
    ],
)
async def test_a_cache_setting_that_nothing_reads_is_pointed_out(
    client: httpx.AsyncClient, body: dict[str, Any], named: str
) -> None:
    warnings = (await answer(client, **body))["warnings"]
    assert warnings[0].startswith(f"{named} had no effect")


async def test_features_that_are_left_off_say_nothing(client: httpx.AsyncClient) -> None:
    body = await answer(
        client,
        img2img_enabled=False,
        img2img_image=None,
        img2img_denoise=0.75,
        hires_fix=False,
        adetailer=False,
        multiscale_enabled=False,
        multiscale_factor=0.5,
        multiscale_fullres_start=3,
        multiscale_fullres_end=8,
        multiscale_intermittent=True,
        loras=[],
        stable_fast=False,
        enable_preview=False,
        attention="sdpa",
    )
    assert body["warnings"] == ["The fake says so."]


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_the_format_asked_for_is_the_format_sent(client: httpx.AsyncClient, output_format: str) -> None:
    body = await answer(client, output_format=output_format)
    assert picture(body["image"]).format == output_format.upper()


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_accepting_a_picture_gets_bytes_and_the_report_in_headers(
    client: httpx.AsyncClient, output_format: str
) -> None:
    headers = {"accept": f"image/{output_format}"}
    response = await client.post("/api/generate", json={**EXAMPLE, "seed": 5}, headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == f"image/{output_format}"
    image = Image.open(io.BytesIO(response.content))
    assert (image.format, image.size) == (output_format.upper(), (768, 512))
    report = {key: value for key, value in response.headers.items() if key.startswith("x-wavespeed-")}
    assert report["x-wavespeed-cache-strategy"] == "deepcache"
    assert report["x-wavespeed-cache-computed"] == "7"
    assert report["x-wavespeed-cache-reused"] == "13"
    assert report["x-wavespeed-cache-hit-rate"] == "0.65"
    assert report["x-wavespeed-seeds"] == "[5]"
    assert report["x-wavespeed-model"] == "fine"
    assert json.loads(report["x-wavespeed-warnings"]) == ["The fake says so."]
    assert "x-wavespeed-total-seconds" in report


@pytest.mark.parametrize(
    ("extra", "field"), [({"num_images": 2}, "num_images"), ({"output_format": "webp"}, "output_format")]
)
async def test_bytes_that_contradict_the_fields_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, extra: dict[str, Any], field: str
) -> None:
    response = await client.post("/api/generate", json={"prompt": "a", **extra}, headers={"accept": "image/png"})
    assert response.status_code == 422
    assert (response.json()["error"]["type"], response.json()["error"]["field"]) == ("incompatible", field)
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("", None),
        ("*/*", None),
        ("text/html", None),
        ("application/json", None),
        ("image/png", "png"),
        ("IMAGE/JPEG", "jpeg"),
        ("image/*", "webp"),
        ("image/avif", None),
        ("image/png;q=0.5, image/jpeg", "jpeg"),
        ("image/png;q=0.5, application/json", None),
        ("image/png, application/json;q=0.5", "png"),
        ("image/png, application/json", None),
        ("image/png;q=0", None),
        ("image/png;q=x", None),
        (",;,=,;q", None),
    ],
)
def test_the_accept_header_is_read_by_its_weights(header: str, wanted: str | None) -> None:
    assert accepted_image(header, "webp") == wanted


async def test_a_png_tells_how_it_was_made(client: httpx.AsyncClient) -> None:
    prompt = "höhle 🌲\nNegative prompt: forged\nSteps: 1"
    body = await answer(client, **{**EXAMPLE, "prompt": prompt, "negative_prompt": "fog", "seed": 7, "sampler": "ddim"})
    image = picture(body["image"])
    text: dict[str, str] = image.text  # type: ignore[attr-defined]
    first, second, third = text["parameters"].split("\n")
    assert first == "höhle 🌲 Negative prompt: forged Steps: 1"
    assert second == "Negative prompt: fog"
    settings = dict(part.split(": ", 1) for part in third.split(", "))
    assert {"Steps": "20", "Sampler": "DDIM", "CFG scale": "7.5", "Seed": "7", "Size": "768x512"}.items() <= (
        settings.items()
    )
    report = json.loads(text["wavespeed"])
    assert report["prompt"] == prompt
    assert (report["seed"], report["model"], report["cache"]["computed"]) == (7, "fine", 7)


async def test_a_full_queue_is_said_with_a_time_to_return() -> None:
    async with client_of(FakeEngine(capacity=0)) as client:
        response = await client.post("/api/generate", json={"prompt": "a"})
    assert (response.status_code, response.json()["error"]["type"]) == (429, "queue_full")
    assert int(response.headers["retry-after"]) > 0


async def test_no_worker_is_said_with_a_time_to_return() -> None:
    async with client_of(FakeEngine(ready=False)) as client:
        generated = await client.post("/api/generate", json={"prompt": "a"})
        models = await client.get("/api/models")
        ready = await client.get("/readyz")
        assert (await client.get("/livez")).json() == {"status": "ok"}
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/api/telemetry")).json()["worker_running"] is False
        assert (await client.get("/metrics")).status_code == 200
    for response in (generated, models, ready):
        assert (response.status_code, response.json()["error"]["type"]) == (503, "not_ready")
        assert int(response.headers["retry-after"]) > 0


class _BuggyEngine(FakeEngine):
    def _result(self, job: Job) -> Any:
        raise KeyError("a bug of ours, with /a/path")


async def test_a_bug_is_a_500_without_its_insides() -> None:
    async with client_of(_BuggyEngine()) as client:
        response = await client.post("/api/generate", json={"prompt": "a"})
        assert (await client.get("/livez")).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["field"], error["request_id"]) == ("internal", None, response.headers["x-request-id"])
    assert "path" not in response.text
    assert 'wavespeed_requests_total{model="fine",outcome="internal"} 1.0' in metrics


async def test_keys_are_asked_for_when_configured(engine: FakeEngine) -> None:
    async with client_of(engine, api_keys=("first", "second")) as client:
        for header in (None, "first", "Bearer", "Bearer wrong", "Basic first", "Bearer firstsecond"):
            headers = {"authorization": header} if header else {}
            response = await client.post("/api/generate", json={"prompt": "a"}, headers=headers)
            assert (response.status_code, response.json()["error"]["type"]) == (401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/api/telemetry")).status_code == 401
        assert engine.submitted == []
        good = await client.post("/api/generate", json={"prompt": "a"}, headers={"authorization": "bearer first"})
        assert good.status_code == 200
        assert (await client.get("/livez")).status_code == 200


async def test_other_addresses_and_methods_are_refused_in_the_same_shape(client: httpx.AsyncClient) -> None:
    missing, wrong = await client.get("/api/nothing"), await client.get("/api/generate")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_models_are_listed_with_their_caches(client: httpx.AsyncClient) -> None:
    body = (await client.get("/api/models")).json()
    assert (body["default"], body["default_flux"]) == ("fine", "flux")
    by_name = {model["name"]: model for model in body["models"]}
    assert (by_name["fine"]["loaded"], by_name["fine"]["plan"]) == (True, PLAN)
    assert (by_name["frozen"]["loaded"], by_name["frozen"]["plan"]) == (False, None)
    assert by_name["flux"]["cache"] == "first_block"
    assert by_name["fine"]["branches"] == [{"branch": 0, "reuse_cost": 0.1}, {"branch": 1, "reuse_cost": 0.25}]
    assert by_name["fine"]["native_size"] == [512, 512]
    assert by_name["fine"]["available"] is True
    assert by_name["broken"]["available"] is False
    assert by_name["fine"]["reason"] is None
    assert "log" in by_name["broken"]["reason"]
    assert "folder" not in str(body)


async def test_every_field_is_described_and_the_document_is_the_example(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    operation = document["paths"]["/api/generate"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/GenerateRequest"}
    assert content["examples"]["document"]["value"] == EXAMPLE
    schemas = document["components"]["schemas"]
    request = schemas["GenerateRequest"]
    assert {"cfg_scale", "residual_diff_threshold"} < set(request["properties"])
    assert request["additionalProperties"] is False
    for name, schema in schemas.items():
        for field, described in schema["properties"].items():
            assert described.get("description"), f"{name}.{field} has no description"
    assert "Lora" in schemas
    assert {"200", "422", "429", "503"} < set(operation["responses"])


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"cfg_free_enabled": True}, 0.7),
        ({"cfg_free_enabled": True, "cfg_free_start_percent": 0}, 0.0),
        ({"cfg_free_enabled": False, "cfg_free_start_percent": 60.0}, 1.0),
        ({"cfg_free_start_percent": 60.0}, 1.0),
        ({"cfg_free_enabled": False, "guidance_end": 0.5}, 0.5),
    ],
)
async def test_lightdiffusion_says_in_percent_where_guidance_ends(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], end: float
) -> None:
    assert (await client.post("/api/generate", json={"prompt": "a", **fields})).status_code == 200
    assert engine.submitted[0].params.guidance_end == end


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"cfg_free_enabled": True, "guidance_end": 0.5}, "cfg_free_enabled"),
        ({"cfg_free_enabled": "yes"}, "cfg_free_enabled"),
        ({"cfg_free_start_percent": 101}, "cfg_free_start_percent"),
        ({"cfg_free_enabled": True, "cfg_free_start_percent": 20, "guidance_start": 0.5}, "guidance_start"),
    ],
)
async def test_what_it_cannot_mean_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], field: str
) -> None:
    response = await client.post("/api/generate", json={"prompt": "a", **fields})
    assert (response.status_code, response.json()["error"]["field"]) == (422, field)
    assert engine.submitted == []
