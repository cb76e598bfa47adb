"""What a client may send and must not: each refused in one shape, with its field and a remedy, and nothing queued."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import ServiceError
from app.http.foreign import LIGHTDIFFUSION
from app.http.resolve import resolve
from app.http.schemas import GenerateRequest, parse
from app.settings import Settings
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine, fake_catalogue

JSON = {"content-type": "application/json"}


def assert_refused(response: httpx.Response, status: int, kind: str, field: str | None, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"type", "message", "field", "request_id"}
    assert (error["type"], error["field"]) == (kind, field)
    assert error["request_id"] == response.headers["x-request-id"]
    for word in words:
        assert word in error["message"]


# field, value as JSON text, words of the answer
OUT_OF_BOUNDS = [
    ("width", "0", "64"),
    ("width", "-1", "64"),
    ("width", "63", "64"),
    ("width", "7", "64"),
    ("width", "2049", "2048"),
    ("width", "1000000000", "2048"),
    ("width", "9223372036854775808", "2048"),
    ("width", "513", "multiple of 8", "512", "520"),
    ("height", "513", "multiple of 8"),
    ("height", "2056", "2048"),
    ("num_images", "0", "1"),
    ("num_images", "11", "10"),
    ("batch_size", "0", "1"),
    ("batch_size", "17", "16"),
    ("steps", "0", "1"),
    ("steps", "151", "150"),
    ("steps", "1000000", "150"),
    ("guidance_scale", "-0.1", "0"),
    ("guidance_scale", "30.5", "30"),
    ("seed", "-2", "-1"),
    ("seed", "4294967296", "4294967295"),
    ("seed", "9223372036854775808", "4294967295"),
    ("deepcache_interval", "0", "1"),
    ("deepcache_interval", "11", "10"),
    ("deepcache_depth", "-1", "0"),
    ("deepcache_depth", "13", "12"),
    ("deepcache_start_step", "-1", "0"),
    ("deepcache_end_step", "1001", "1000"),
    ("fbcache_threshold", "-1", "0"),
    ("fbcache_threshold", "2", "1"),
    ("fbcache_max_consecutive", "0", "1"),
    ("fbcache_max_consecutive", "51", "50"),
    ("cache_speedup", "0.99", "1"),
    ("cache_speedup", "6.01", "6"),
    ("cache_floor", "-0.0", "0"),
    ("cache_floor", "101", "100"),
    ("img2img_denoise", "1.5", "1"),
    ("multiscale_factor", "0", "0"),
    ("multiscale_fullres_start", "-1", "0"),
]
NOT_A_NUMBER = [
    (field, value, "finite" if field.endswith(("scale", "threshold", "speedup")) else "integer")
    for field in ("guidance_scale", "fbcache_threshold", "cache_speedup", "width", "seed", "deepcache_interval")
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999")
]
WRONG_TYPE = [
    ("prompt", "null", "string"),
    ("prompt", "1", "string"),
    ("prompt", '["a"]', "string"),
    ("prompt", '"\\ud800"', "surrogate"),
    ("prompt", '"a\\u0000b"', "NUL"),
    ("negative_prompt", '"\\udfff"', "surrogate"),
    ("model", "1", "string"),
    ("model", '""', "character"),
    ("model", '"\\ud800"', "surrogate"),
    ("width", "true", "integer"),
    ("width", '"512"', "integer"),
    ("width", "512.0", "integer"),
    ("width", "512.5", "integer"),
    ("width", "null", "integer"),
    ("width", "[512]", "integer"),
    ("steps", "false", "integer"),
    ("seed", '"1"', "integer"),
    ("guidance_scale", "true", "number"),
    ("guidance_scale", '"7"', "number"),
    ("deepcache_enabled", "1", "boolean"),
    ("deepcache_enabled", '"true"', "boolean"),
    ("deepcache_preset", '"fast"', "balanced"),
    ("cache_forecast", '"linear"', "true", "the published cache"),
    ("cache_forecast", '"none"', "false", "the published cache"),
    ("cache_forecast", "1", "boolean"),
    ("cache_forecast", "null", "boolean"),
    ("cache_correction", "true", "cache_forecast"),
    ("cache_speedup", '"2"', "number"),
    ("cache_speed", "2", "cache_speedup"),
    ("deepcache_schedule", '"best"', "uniform"),
    ("deepcache_guidance", '"half"', "reuse"),
    ("attention", '"flash"', "sdpa"),
    ("output_format", '"gif"', "png"),
    ("loras", '"a"', "list"),
]
UNKNOWN_SAMPLER = [("sampler", '"eulr"', "euler", "ddim"), ("scheduler", '"beta"', "karras")]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [(field, value, words) for field, value, *words in OUT_OF_BOUNDS + NOT_A_NUMBER + WRONG_TYPE + UNKNOWN_SAMPLER],
)
async def test_a_bad_value_is_refused_by_name(
    client: httpx.AsyncClient, engine: FakeEngine, field: str, value: str, words: list[str]
) -> None:
    prompt = '"prompt": "a", ' if field != "prompt" else ""
    response = await client.post("/api/generate", content=f'{{{prompt}"{field}": {value}}}', headers=JSON)
    assert_refused(response, 422, "invalid", field, *words)
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("values", "kind", "field", "words"),
    [
        ({"model": "flux", "deepcache_enabled": True}, "incompatible", "deepcache_enabled", ["FBCache"]),
        ({"flux_enabled": True, "deepcache_enabled": True}, "incompatible", "deepcache_enabled", ["FBCache"]),
        ({"flux_enabled": True, "deepcache_preset": "balanced", "deepcache_enabled": True}, "incompatible",
         "deepcache_enabled", ["FBCache"]),
        ({"fbcache_enabled": True}, "incompatible", "fbcache_enabled", ["DeepCache"]),
        ({"model": "fine", "fbcache_enabled": True}, "incompatible", "fbcache_enabled", ["DeepCache"]),
        ({"deepcache_enabled": True, "img2img_enabled": True}, "incompatible", "deepcache_enabled", ["false"]),
        ({"deepcache_enabled": True, "img2img_enabled": True, "img2img_image": "aGk="}, "incompatible",
         "deepcache_enabled", ["false"]),
        ({"flux_enabled": True, "stable_fast": True}, "incompatible", "stable_fast", ["Leave it out"]),
        ({"flux_enabled": True, "model": "fine"}, "incompatible", "flux_enabled", ["fine"]),
        ({"flux_enabled": True, "width": 520}, "invalid", "width", ["multiple of 16", "512", "528"]),
        ({"deepcache_start_step": 801, "deepcache_end_step": 800}, "invalid", "deepcache_start_step",
         ["deepcache_end_step"]),
        ({"deepcache_preset": "balanced", "deepcache_interval": 3}, "invalid", "deepcache_interval", ["preset"]),
        ({"deepcache_preset": "partial", "deepcache_end_step": 900}, "invalid", "deepcache_end_step", ["preset"]),
        ({"cfg_scale": 5, "guidance_scale": 5}, "invalid", "cfg_scale", ["guidance_scale"]),
        ({"sampler": "ddim", "scheduler": "karras"}, "invalid", "scheduler", ["normal", "euler"]),
        ({"deepcache_intervall": 3}, "invalid", "deepcache_intervall", ["'deepcache_interval'"]),
        ({"Width": 512}, "invalid", "Width", ["'width'"]),
        ({"cfg": 5}, "invalid", "cfg", ["'cfg_scale'"]),
        ({"\ud800": 1}, "invalid", "\\ud800", ["no field"]),
        ({"x" * 5000: 1}, "invalid", "x" * 80 + "…", ["no field"]),
        ({"": 1}, "invalid", "", ["no field"]),
        ({"width": 0, "steps": 0}, "invalid", "width", ["Also wrong: steps"]),
        ({"loras": [{"name": "a", "wieght": 1}]}, "invalid", "loras.0.wieght", []),
        ({"loras": [{"name": "a"}, {"name": "a"}]}, "invalid", "loras", ["once"]),
        ({"flux_enabled": True, "clip_skip": 2}, "incompatible", "clip_skip", ["UNet", "Leave it out"]),
        ({"flux_enabled": True, "guidance_rescale": 0.5}, "incompatible", "guidance_rescale", ["UNet"]),
        ({"guidance_start": 0.8, "guidance_end": 0.5}, "invalid", "guidance_start", ["guidance_end", "swap"]),
        ({"flux_enabled": True, "freeu": True}, "incompatible", "freeu", ["UNet", "Leave it out"]),
        ({"prompt": "a (b:11)"}, "invalid", "prompt", ["'b' is 11", "0 to 10"]),
        ({"negative_prompt": "(" * 9998 + "a"}, "invalid", "negative_prompt", ["'a' is"]),
        ({"negative_prompt": "a [b] " * 40}, "invalid", "negative_prompt", ["below 1", "Join"]),
    ],
)  # fmt: skip
async def test_what_does_not_go_together_is_refused_with_a_remedy(
    client: httpx.AsyncClient, engine: FakeEngine, values: dict[str, Any], kind: str, field: str, words: list[str]
) -> None:
    response = await client.post("/api/generate", content=json.dumps({"prompt": "a", **values}), headers=JSON)
    assert_refused(response, 422, kind, field, *words)
    assert engine.submitted == []


@pytest.mark.parametrize(
    "name", ["tiny", "..", "../fine", "/etc/passwd", "%2e%2e", "a\\b", "runwayml/stable-diffusion-v1-5", "x.ckpt"]
)
async def test_a_model_is_a_configured_name_and_nothing_else(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    response = await client.post("/api/generate", json={"prompt": "a", "model": name})
    assert_refused(response, 404, "unknown_model", "model", "fine")
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        (b"", JSON, "empty"),
        (b"  \n", JSON, "empty"),
        (b'{"prompt": "a"', JSON, "not JSON"),
        (b'{"prompt": "a"}}', JSON, "not JSON"),
        (b'{"prompt": "\xff"}', JSON, "not JSON"),
        (b'{"seed": ' + b"1" * 5000 + b"}", JSON, "not JSON"),
        (b"[" * 100_000, JSON, "nested too deeply"),
        (b'{"prompt":' + b'{"a":' * 50_000, JSON, "nested too deeply"),
        (b"[1]", JSON, "JSON object"),
        (b"null", JSON, "JSON object"),
        (b'"a"', JSON, "JSON object"),
        (b'{"prompt": "a"}', {}, "Content-Type"),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}, "application/json"),
        (b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}, "application/json"),
        (b'{"prompt": "a"}', {**JSON, "content-encoding": "gzip"}, "Content-Encoding"),
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, body: bytes, headers: dict[str, str], words: str
) -> None:
    response = await client.post("/api/generate", content=body, headers=headers)
    assert_refused(response, 422, "invalid", None, words)
    assert engine.submitted == []


async def test_a_key_given_twice_is_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/api/generate", content='{"prompt": "a", "prompt": "b"}', headers=JSON)
    assert_refused(response, 422, "invalid", "prompt", "more than once")
    assert engine.submitted == []


async def test_a_prompt_is_required(client: httpx.AsyncClient) -> None:
    assert_refused(await client.post("/api/generate", json={}), 422, "invalid", "prompt", "required")


async def test_a_prompt_has_a_longest_length(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.post("/api/generate", json={"prompt": "é" * 10_000})).status_code == 200
    response = await client.post("/api/generate", json={"prompt": "é" * 10_001})
    assert_refused(response, 422, "invalid", "prompt", "10000")
    assert len(engine.submitted) == 1


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_past_the_limit_is_refused_whether_declared_or_not(engine: FakeEngine, chunked: bool) -> None:
    body = json.dumps({"prompt": "a" * 5000}).encode()

    async def pieces() -> Any:
        for at in range(0, len(body), 500):
            yield body[at : at + 500]

    async with client_of(engine, max_body_bytes=2048) as client:
        response = await client.post("/api/generate", content=pieces() if chunked else body, headers=JSON)
    assert_refused(response, 413, "body_too_large", None, "2048")
    assert engine.submitted == []


async def test_a_declared_length_past_the_limit_is_refused_unread(engine: FakeEngine) -> None:
    async with client_of(engine, max_body_bytes=2048) as client:
        headers = {**JSON, "content-length": "9" * 30}
        response = await client.post("/api/generate", content=b"{}", headers=headers)
    assert_refused(response, 413, "body_too_large", None)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.sampled_from(["fine", "flux", "euler", "karras", "balanced", "png"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(
    st.dictionaries(
        st.sampled_from([*GenerateRequest.model_fields, *LIGHTDIFFUSION])
        | st.text(st.characters(exclude_categories=()), max_size=8),
        VALUES,
        max_size=6,
    )
)
def test_any_object_becomes_a_job_or_an_answer(body: dict[str, Any]) -> None:
    answer: tuple[int, dict[str, Any]] = (200, {})
    try:
        job = resolve(parse({"prompt": "a", **body}), fake_catalogue(), Settings(), "id")
        answer = (200, {"seeds": job.params.seeds})
    except ServiceError as error:
        answer = (error.status, error.body("id"))
    assert answer[0] in (200, 404, 422)
    json.dumps(answer[1], ensure_ascii=False, allow_nan=False).encode()
