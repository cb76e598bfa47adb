"""Whose a request is, and which pages of a browser may ask for a change."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import pytest

from app.http.middleware import Guard
from app.settings import Settings
from tests.app.children import Nursery
from tests.app.conftest import client_of
from tests.app.fakes import FakeEngine
from tests.app.test_engine import until
from tests.app.test_jobs import BODY, asked, served

FOREIGN = "https://evil.example"
CHANGES = [
    ("POST", "/api/generate"),
    ("POST", "/api/jobs"),
    ("DELETE", "/api/jobs/" + "0" * 32),
    ("DELETE", "/api/jobs/" + "0" * 32 + "/result"),
    ("POST", "/v1/images/generations"),
    ("POST", "/sdapi/v1/txt2img"),
    ("POST", "/sdapi/v1/img2img"),
    ("POST", "/sdapi/v1/interrupt"),
    ("POST", "/sdapi/v1/options"),
    ("POST", "/sdapi/v1/png-info"),
    ("POST", "/sdapi/v1/refresh-loras"),
    ("POST", "/api/interrupt"),
    ("POST", "/api/images/metadata"),
]


def spellings(key: str) -> list[str]:
    """All that one key can look like."""
    basic = base64.b64encode(f"anybody:{key}".encode()).decode()
    return [f"Bearer {key}", f"bearer  {key}", f"Basic {basic}", f"basic {basic}"]


def under_way(answer: httpx.Response) -> Any:
    return answer.json()["state"]["job_count"]


async def test_a_caller_is_the_key_that_matched_however_it_is_sent() -> None:
    nursery = Nursery()
    async with served(nursery, api_keys=("one", "two")) as client:

        def get(header: str) -> Any:
            return client.get("/sdapi/v1/progress", headers={"Authorization": header})

        headers = {"Authorization": "Bearer one"}
        drawing = asyncio.create_task(client.post("/sdapi/v1/txt2img", json=BODY, headers=headers))
        await until(lambda: nursery.gate.at == "text")
        assert [under_way(await get(header)) for header in spellings("one")] == [1, 1, 1, 1]
        assert [under_way(await get(header)) for header in spellings("two")] == [0, 0, 0, 0]
        for header in spellings("two"):
            await client.post("/sdapi/v1/interrupt", headers={"Authorization": header})
        assert not drawing.done()
        await client.post("/sdapi/v1/interrupt", headers={"Authorization": spellings("one")[2]})
        assert (await drawing).status_code == 409
        nursery.gate.open(100)


async def test_without_keys_a_caller_is_an_address() -> None:
    nursery = Nursery()
    engine = nursery.engine()
    async with client_of(engine) as client:
        await until(lambda: engine.status().ready)
        app = client._transport.app  # type: ignore[attr-defined]
        other = httpx.AsyncClient(transport=httpx.ASGITransport(app, client=("10.0.0.2", 1)), base_url="http://test")
        drawing = asyncio.create_task(client.post("/sdapi/v1/txt2img", json=BODY))
        await until(lambda: nursery.gate.at == "text")
        forwarded = {"X-Forwarded-For": "127.0.0.1"}
        assert under_way(await other.get("/sdapi/v1/progress", headers=forwarded)) == 0
        await other.post("/sdapi/v1/interrupt", headers=forwarded)
        assert under_way(await client.get("/sdapi/v1/progress")) == 1
        await client.post("/sdapi/v1/interrupt")
        assert (await drawing).status_code == 409
        nursery.gate.open(100)


async def test_the_job_of_another_key_is_not_there(nursery: Nursery) -> None:
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    async with served(nursery, api_keys=("one", "two")) as client:
        identity = (await asked(client, one)).json()["id"]
        for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            refused = await client.request(method, f"/api/jobs/{identity}{path}", headers=two)
            assert (refused.status_code, refused.json()["error"]["type"]) == (404, "unknown_job")
        assert (await client.get(f"/api/jobs/{identity}", headers=one)).status_code == 200
        nursery.gate.open(100)


async def test_a_request_that_is_waited_for_is_nobody_elses_to_see(nursery: Nursery) -> None:
    async with served(nursery) as client:
        drawing = asyncio.create_task(client.post("/api/generate", json=BODY))
        await until(lambda: nursery.gate.at == "text")
        nursery.gate.open(100)
        identity = (await drawing).json()["request_id"]
        assert (await client.get(f"/api/jobs/{identity}")).status_code == 404


@pytest.mark.parametrize("keys", [(), ("one",)])
@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_no_page_of_another_site_changes_anything(
    engine: FakeEngine, method: str, path: str, keys: tuple[str, ...]
) -> None:
    """Also what a form sends, which a browser lets go without asking the server first."""
    headers = {"Authorization": spellings("one")[2], "Content-Type": "text/plain"}
    async with client_of(engine, api_keys=keys) as client:
        for named in ({"Origin": FOREIGN}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            refused = await client.request(method, path, headers={**headers, **named})
            assert (refused.status_code, refused.json()["error"]["type"]) == (403, "foreign_origin")
            assert "WAVESPEED_CORS_ORIGINS" in refused.json()["error"]["message"]
    assert engine.submitted == []


async def test_our_own_pages_and_listed_origins_may(engine: FakeEngine) -> None:
    async with client_of(engine, cors_origins=("https://Studio.example",)) as client:
        for origin in ("http://test", "https://studio.example"):
            answer = await client.post("/api/generate", json=BODY, headers={"Origin": origin})
            assert answer.status_code == 200
        assert (await client.get("/api/models", headers={"Origin": FOREIGN})).status_code == 200  # a look


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/docs", "/metrics", "/api/models", "/openapi.json"])
async def test_head_is_get_without_the_body(client: httpx.AsyncClient, path: str) -> None:
    whole, head = await client.get(path), await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


async def test_head_of_a_stream_ends_at_once(nursery: Nursery) -> None:
    async with served(nursery) as client:
        identity = (await asked(client)).json()["id"]
        head = await asyncio.wait_for(client.head(f"/api/jobs/{identity}/events"), 30)
        assert (head.status_code, head.content) == (200, b"")
        nursery.gate.open(100)


async def test_a_slash_too_much_leads_nowhere(client: httpx.AsyncClient) -> None:
    """A redirect would name the scheme that this process sees, which behind TLS is the wrong one."""
    for path in ("/api/models/", "/metrics/", "/v1/models/"):
        assert (await client.get(path)).status_code == 404


async def test_a_listed_origin_may_send_what_client_packages_send(engine: FakeEngine) -> None:
    asks = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
    preflight = {
        "Origin": "https://a.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asks,
    }  # fmt: skip
    async with client_of(engine, cors_origins=("https://a.example",)) as client:
        allowed = await client.options("/v1/images/generations", headers=preflight)
        answer = await client.post("/api/generate", json=BODY, headers={"Origin": "https://a.example"})
    assert (allowed.status_code, allowed.headers["access-control-allow-headers"]) == (200, asks)
    assert answer.headers["access-control-expose-headers"] == "*"  # X-WaveSpeed-*, Location, Retry-After


def test_no_proxy_is_believed_unless_it_is_named() -> None:
    assert Settings(_env_file=None).proxies == ()  # type: ignore[call-arg]


@pytest.mark.parametrize("token", ["ours", "another", ""])
async def test_the_page_alone_says_for_whom_it_asks(token: str) -> None:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/api/jobs",
        "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"localhost"), (b"x-wavespeed-visitor", f"{token} 10.0.0.7".encode())],
    }
    own = Guard((), (), metrics_open=True, page="ours")
    assert own.owner(scope) == ("peer:10.0.0.7" if token == "ours" else "peer:127.0.0.1")
    assert Guard((), (), metrics_open=True).owner(scope) == "peer:127.0.0.1"  # a server without a page believes nobody
