"""Who may ask, what a browser may do with an answer, and what a client's words can do to a log or a picture's text."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from pydantic import ValidationError

from app.log import logging_to
from app.settings import Settings
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine

KEY = {"authorization": "Bearer first"}
ORIGIN = "https://studio.example"


@pytest.mark.parametrize(
    "path", ["/api/telemetry", "/api/models", "/v1/models", "/api/nothing", "/nothing", "/index.html", "/api//models"]
)
async def test_every_address_asks_for_a_key(engine: FakeEngine, path: str) -> None:
    async with client_of(engine, api_keys=("first", "second")) as client:
        refused, let_in = await client.get(path), await client.get(path, headers=KEY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "unauthorized")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert let_in.status_code in (200, 404)


@pytest.mark.parametrize(
    "path", ["/", "/livez", "/readyz", "/health", "/docs", "/docs/swagger-ui.css", "/openapi.json", "/metrics"]
)
async def test_what_holds_nothing_of_a_user_stays_open(engine: FakeEngine, path: str) -> None:
    async with client_of(engine, api_keys=("first",)) as client:
        assert (await client.get(path)).status_code == 200


async def test_metrics_can_be_closed_too(engine: FakeEngine) -> None:
    async with client_of(engine, api_keys=("first",), metrics_open=False) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers=KEY)).status_code == 200


async def test_any_of_several_keys_lets_in_and_the_header_is_all_that_counts(engine: FakeEngine) -> None:
    async with client_of(engine, api_keys=("first", "second")) as client:

        async def status(value: bytes, query: str = "") -> int:
            return (await client.get(f"/api/models{query}", headers={b"authorization": value})).status_code

        assert [await status(value) for value in (b"Bearer first", b"bearer second", b"BEARER  second ")] == [200] * 3
        wrong = [
            b"",
            b"first",
            b"Bearer",
            b"Bearer ",
            b"Bearer firs",
            b"Bearer first,second",
            b"Bearer \xff",
            b"Basic first",
        ]
        assert [await status(value) for value in wrong] == [401] * len(wrong)
        assert await status(b"", "?key=first&authorization=Bearer%20first") == 401


@pytest.mark.parametrize("value", [",", " , ", "a b", "clé", "a\tb"])
def test_keys_that_nobody_could_send_are_refused_at_start(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WAVESPEED_API_KEYS", value)
    with pytest.raises(ValidationError):
        Settings(_env_file=None)  # type: ignore[call-arg]


def test_keys_are_not_in_what_settings_print() -> None:
    assert "a-secret" not in repr(Settings(_env_file=None, api_keys=("a-secret",)))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:7861",
        "app.localhost",
        "127.0.0.1:7861",
        "[::1]:7861",
        "[::ffff:10.1.2.3]:80",
        "10.1.2.3",
        "wavespeed:7861",
    ],
)
async def test_an_address_or_a_word_names_this_server(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/livez", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7861", "127.0.0.1.evil.example", "evil.localhost.example", "a.example."]
)
async def test_a_strangers_name_for_this_server_is_refused(engine: FakeEngine, host: str) -> None:
    async with client_of(engine, allowed_hosts=("pictures.example",)) as client:
        refused = await client.post("/api/generate", json={"prompt": "a"}, headers={"host": host})
        assert (refused.status_code, refused.json()["error"]["type"]) == (421, "misdirected")
        assert "WAVESPEED_ALLOWED_HOSTS" in refused.json()["error"]["message"]
        assert engine.submitted == []
        assert (await client.get("/api/models", headers={"host": "Pictures.example:443"})).status_code == 200


async def test_with_keys_any_name_will_do(engine: FakeEngine) -> None:
    async with client_of(engine, api_keys=("first",)) as client:
        assert (await client.get("/api/models", headers={**KEY, "host": "a.example"})).status_code == 200


async def test_no_other_origin_is_let_in_by_default(client: httpx.AsyncClient) -> None:
    preflight = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    asked = await client.options("/api/generate", headers=preflight)
    answered = await client.get("/api/models", headers={"origin": ORIGIN})
    assert asked.status_code == 405
    assert not any(name.startswith("access-control") for name in (*asked.headers, *answered.headers))


async def test_a_configured_origin_may_ask_with_a_key_and_read_refusals(engine: FakeEngine) -> None:
    preflight = {
        "origin": ORIGIN, "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }  # fmt: skip
    async with client_of(engine, cors_origins=(ORIGIN,), api_keys=("first",)) as client:
        asked = await client.options("/api/generate", headers=preflight)
        refused = await client.get("/api/models", headers={"origin": ORIGIN})
        stranger = await client.options("/api/generate", headers={**preflight, "origin": "https://evil.example"})
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    assert stranger.status_code == 400
    assert "access-control-allow-origin" not in stranger.headers
    assert "access-control-allow-credentials" not in asked.headers


@pytest.mark.parametrize("origin", ["*", "studio.example", "https://studio.example/path", "null", "https://*.example"])
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ValidationError, match="no origin"):
        Settings(_env_file=None, cors_origins=(origin,))  # type: ignore[call-arg]


@pytest.mark.parametrize("accept", ["image/png", "image/webp", "application/json"])
async def test_a_browser_neither_sniffs_nor_runs_nor_frames_an_answer(client: httpx.AsyncClient, accept: str) -> None:
    good = await client.post("/api/generate", json={"prompt": "a"}, headers={"accept": accept})
    bad = await client.post("/api/generate", json={}, headers={"accept": accept})
    assert (good.status_code, bad.status_code) == (200, 422)
    for response in (good, bad, await client.get("/nothing")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'; sandbox"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["referrer-policy"] == "no-referrer"


async def test_the_documentation_page_needs_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "default-src 'none'" in policy
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) == 5
    assert "<script>" not in page.text  # the policy would not run it
    for address in loaded:
        assert not address.startswith(("http", "//"))
        answer = await client.get(f"/{address}")
        assert answer.status_code == 200, address
    assert (await client.get("/docs/swagger-ui-bundle.js")).headers["content-type"].startswith("text/javascript")
    for stray in ("/docs/redoc.standalone.js", "/docs/..%2fcore.py", "/docs/%2e%2e/core.py", "/redoc"):
        assert (await client.get(stray)).status_code == 404, stray


async def test_the_first_page_says_where_everything_is(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    addresses = re.findall(r'href="([^"]+)"', page.text)
    assert {"docs", "api/models", "readyz"} <= set(addresses)
    for address in addresses:
        assert (await client.get(f"/{address}")).status_code == 200, address


FORGED = "a\ncache strategy=deepcache hit_rate=1.00\x1b[2J\u202e\r\u2028\x85end"


@pytest.mark.parametrize(
    "body",
    [
        {FORGED: 1},
        {"prompt": "a", "model": FORGED},
        {"prompt": "a", "sampler": FORGED},
        {"prompt": "a", "loras": [{"name": "a", FORGED: 1}]},
        {"prompt": "a", "output_format": FORGED},
        {"prompt": FORGED},
    ],
)
async def test_a_clients_words_make_no_line_of_the_log(
    engine: FakeEngine, tmp_path: Path, body: dict[str, Any]
) -> None:
    with logging_to(tmp_path, "DEBUG") as path:
        async with client_of(engine) as client:
            response = await client.post("/api/generate", json=body)
    text = path.read_text(encoding="utf-8")
    mine = [line for line in text.splitlines() if f"request={response.headers['x-request-id']}" in line]
    assert len([line for line in mine if ": refused" in line or "hit_rate=" in line]) == 1
    assert not re.search(r": cache strategy=deepcache hit_rate=1\.00", text)
    assert all(char.isprintable() or char == "\n" for char in text)


async def test_a_key_given_twice_with_a_forged_name_is_one_line(engine: FakeEngine, tmp_path: Path) -> None:
    name = json.dumps(FORGED)
    with logging_to(tmp_path, "INFO") as path:
        async with client_of(engine) as client:
            headers = {"content-type": "application/json"}
            response = await client.post("/api/generate", content=f"{{{name}: 1, {name}: 2}}", headers=headers)
    assert response.status_code == 422
    assert "\n" not in response.json()["error"]["field"]
    assert sum("refused" in line for line in path.read_text().splitlines()) == 1
    assert ": cache strategy" not in path.read_text()


async def test_one_key_twice_among_many_is_found_in_one_pass(client: httpx.AsyncClient) -> None:
    """Counting each of 200 000 keys would be 40 billion comparisons."""
    keys = ",".join(f'"{index}":0' for index in range(200_000))
    started = time.monotonic()
    headers = {"content-type": "application/json"}
    response = await client.post("/api/generate", content=f'{{{keys},"199999":1}}', headers=headers)
    assert response.json()["error"]["field"] == "199999"
    assert time.monotonic() - started < 60  # counting would take many minutes


async def png_text(client: httpx.AsyncClient, **body: Any) -> dict[str, str]:
    answer = (await client.post("/api/generate", json={"width": 64, "height": 64, "seed": 7, **body})).json()
    with Image.open(io.BytesIO(base64.b64decode(answer["image"]))) as picture:
        picture.load()
        return dict(picture.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "prompt", [FORGED, "\n\nSteps: 1, Sampler: x, Seed: 9, Size: 1x1", "😀\u200d🔥 \x00".replace("\x00", "\x07")]
)
async def test_a_prompt_cannot_forge_settings_in_a_pictures_text(client: httpx.AsyncClient, prompt: str) -> None:
    text = await png_text(client, prompt=prompt, negative_prompt=f"x\nSteps: 2, Seed: 3{prompt}")
    first, negative, settings = text["parameters"].split("\n")
    assert negative.startswith("Negative prompt: x Steps: 2")
    assert re.match(r"Steps: 20, .*Seed: 7, Size: 64x64", settings)
    for line in (first, negative):
        assert all(char.isprintable() or char == "\u200d" for char in line)
    assert json.loads(text["wavespeed"])["prompt"] == prompt


async def test_an_emoji_of_several_stays_whole(client: httpx.AsyncClient) -> None:
    assert (await png_text(client, prompt="👩\u200d🚀 waves"))["parameters"].startswith("👩\u200d🚀 waves\n")


async def test_no_prompt_in_telemetry_metrics_or_log(engine: FakeEngine, tmp_path: Path) -> None:
    with logging_to(tmp_path, "DEBUG") as path:
        async with client_of(engine) as client:
            for body in ({"prompt": "zebra-crossing"}, {"prompt": "zebra-crossing", "width": 3}):
                await client.post("/api/generate", json={**body, "negative_prompt": "zebra-crossing"})
            seen = (await client.get("/api/telemetry")).text + (await client.get("/metrics")).text
    assert "zebra" not in seen + path.read_text()
