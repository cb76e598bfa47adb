"""/v1 without a socket: what is refused and with which remedy. The package itself talks to it in tests/clients."""

from __future__ import annotations

import httpx
import pytest

from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_bad_input import JSON, assert_refused

# members as JSON text, type, field, words of the answer
REFUSED = [
    ('"n": 0', "invalid", "n", "1"),
    ('"n": 11', "invalid", "n", "10"),
    ('"n": 1000000000000', "invalid", "n", "10"),
    ('"n": true', "invalid", "n", "integer"),
    ('"n": 1.5', "invalid", "n", "integer"),
    ('"n": NaN', "invalid", "n", "integer"),
    ('"n": "2"', "invalid", "n", "integer"),
    ('"num_images": 2', "invalid", "num_images", "called n"),
    ('"size": "512"', "invalid", "size", "768x512"),
    ('"size": "512X512"', "invalid", "size", "768x512"),
    ('"size": "-512x512"', "invalid", "size", "768x512"),
    ('"size": "٥١٢x512"', "invalid", "size", "768x512"),
    ('"size": "\\ud800"', "invalid", "size", "surrogate"),
    ('"size": 512', "invalid", "size", "string"),
    ('"size": ""', "invalid", "size", "768x512"),
    ('"size": "0x0"', "invalid", "width", "64"),
    ('"size": "99999x512"', "invalid", "width", "2048"),
    ('"size": "512x513"', "invalid", "height", "multiple of 8"),
    ('"size": "512x512", "width": 512', "invalid", "width", "size says width already"),
    ('"stream": 1', "invalid", "stream", "boolean"),
    ('"stream": true, "partial_images": 4', "invalid", "partial_images", "3"),
    ('"stream": true, "partial_images": -1', "invalid", "partial_images", "0"),
    ('"partial_images": 2', "invalid", "partial_images", "set stream to true"),
    ('"enable_preview": true', "unsupported", "enable_preview", "partial_images"),
    ('"response_format": "url", "stream": true', "invalid", "response_format", "leave response_format out"),
    ('"response_format": "xml"', "invalid", "response_format", "b64_json"),
    ('"quality": "best"', "unsupported", "quality", "steps"),
    ('"quality": 1', "unsupported", "quality", "steps"),
    ('"style": "noir"', "unsupported", "style", "prompt"),
    ('"background": "transparent"', "unsupported", "background", "opaque"),
    ('"moderation": "high"', "unsupported", "moderation", "moderated"),
    ('"moderation": ["auto"]', "unsupported", "moderation", "moderated"),
    ('"output_compression": 50', "unsupported", "output_compression", "95"),
    ('"output_compression": true', "unsupported", "output_compression", "95"),
    ('"output_format": "gif"', "invalid", "output_format", "png"),
    ('"svg": {"model": "x"}', "unsupported", "svg", "png"),
    ('"user": 5', "invalid", "user", "string"),
    ('"user": "' + "x" * 201 + '"', "invalid", "user", "200"),
    ('"prompt": null', "invalid", "prompt", "string"),
    ('"prompt": "\\udfff"', "invalid", "prompt", "surrogate"),
    ('"sise": "512x512"', "invalid", "sise", "'size'"),
    ('"guidance_scale": NaN', "invalid", "guidance_scale", "finite"),
    ('"deepcache_interval": 11', "invalid", "deepcache_interval", "10"),
    ('"img2img_enabled": true, "img2img_image": "/etc/passwd"', "invalid", "img2img_image", "not read"),
    ('"model": "flux", "deepcache_enabled": true', "incompatible", "deepcache_enabled", "FBCache"),
]


@pytest.mark.parametrize(("members", "kind", "field", "words"), REFUSED)
async def test_what_would_change_nothing_or_is_wrong_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, members: str, kind: str, field: str, words: str
) -> None:
    prompt = "" if '"prompt"' in members else '"prompt": "a", '
    response = await client.post("/v1/images/generations", content=f"{{{prompt}{members}}}", headers=JSON)
    assert_refused(response, 422, kind, field, words)
    assert engine.submitted == []


async def test_what_changes_no_picture_is_taken_and_named(client: httpx.AsyncClient) -> None:
    for quality in ("auto", "standard", "low", "medium", "high", "hd"):
        body = {"prompt": "a", "n": 1.0, "quality": quality, "style": "natural", "moderation": "low", "size": "auto"}
        answer = await client.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        said = " ".join(answer.json()["warnings"])
        assert "style" in said
        assert ("quality" in said) is (quality not in ("auto", "standard"))


async def test_a_url_is_the_picture_itself(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "seed": 7, "output_format": "webp"}
    plain, linked = [
        (await client.post("/v1/images/generations", json={**body, **form})).json()["data"][0]
        for form in ({}, {"response_format": "url"})
    ]
    assert linked == {"url": f"data:image/webp;base64,{plain['b64_json']}"}


async def test_null_is_as_good_as_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    names = ("n", "size", "stream", "partial_images", "user", "safety_identifier", "output_format", "model", "seed")
    absent = dict.fromkeys([*names, "quality", "style", "background", "svg", "response_format"])
    response = await client.post("/v1/images/generations", json={"prompt": "a", **absent})
    assert response.status_code == 200, response.text
    params = engine.submitted[0].params
    assert (params.width, params.height, len(params.seeds)) == (512, 512, 1)


async def test_a_stream_that_cannot_begin_is_refused_as_anything_else() -> None:
    body = {"prompt": "a", "stream": True}
    async with client_of(FakeEngine(ready=False)) as client:
        assert_refused(await client.post("/v1/images/generations", json=body), 503, "not_ready", None)
        assert_refused(await client.get("/v1/models"), 503, "not_ready", None)
    async with client_of(FakeEngine(capacity=0)) as client:
        assert_refused(await client.post("/v1/images/generations", json=body), 429, "queue_full", None)
    async with client_of(FakeEngine(), api_keys="a-key") as client:
        assert_refused(await client.post("/v1/images/generations", json=body), 401, "unauthorized", None)
        assert_refused(await client.get("/v1/models"), 401, "unauthorized", None)


@pytest.mark.parametrize("name", ["dall-e-3", "..", "%2e%2e", "a%5cb", "%ed%a0%80", "x" * 3000])
async def test_a_model_that_is_not_there_is_not_found(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert len(response.json()["error"]["message"]) < 400
