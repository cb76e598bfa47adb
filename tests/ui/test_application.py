"""The page behind the service's port: who is let in, what of it is served, and that it is a process of its own."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator

import httpx
import psutil
import pytest

from app.http import middleware
from app.ui import application
from benchmarks.server import Server, running, wait_for

pytest.importorskip("streamlit", reason="Streamlit, of the extra `ui`, is not installed")
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

KEY = "a-key;of=odd~chars"
COOKIE = f"wavespeed_key={base64.urlsafe_b64encode(KEY.encode()).decode()}"
SOCKET = "/_stcore/stream"


def test_both_sides_have_one_name_for_the_header_and_the_cookie() -> None:
    """The page may not import the service, nor the service the page."""
    assert (middleware.VISITOR.lower(), middleware.KEY_COOKIE) == (application.VISITOR, application.KEY_COOKIE)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    command = ("-m", "tests.ui.server", "page")
    with running(command, WAVESPEED_PORT="0", WAVESPEED_DEVICE="cpu", WAVESPEED_API_KEYS=KEY) as server:
        wait_for(lambda: httpx.get(server.url, headers={"Cookie": COOKIE}).status_code == 200, 60, "the page")
        yield server


def handshake(server: Server, **headers: str) -> int:
    """The status that a websocket is answered with."""
    host, port = server.address
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    origin = given.pop("Origin", None)
    try:
        url = f"ws://{host}:{port}{SOCKET}"
        with connect(url, subprotocols=["streamlit"], additional_headers=given, origin=origin) as socket:  # type: ignore[arg-type, list-item]
            assert socket.subprotocol == "streamlit"
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


def test_a_key_is_asked_for_at_the_door_and_kept_as_a_cookie(server: Server) -> None:
    with httpx.Client(base_url=server.url) as browser:
        door = browser.get("/")
        assert (door.status_code, door.headers["content-type"]) == (401, "text/html; charset=utf-8")
        assert 'name="key"' in door.text
        assert "form-action 'self'" in door.headers["content-security-policy"]
        assert door.headers["referrer-policy"] == "same-origin"  # else a browser sends the form from the origin null
        wrong = browser.post("/", data={"key": "<b>no</b>"})
        assert (wrong.status_code, "none of this server" in wrong.text, "<b>" in wrong.text) == (401, True, False)
        right = browser.post("/", data={"key": KEY})
        assert (right.status_code, right.headers["location"]) == (303, "./")
        kept = right.headers["set-cookie"]
        assert all(word in kept for word in ("HttpOnly", "SameSite=strict"))
        page = browser.get("/")
        assert page.status_code == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


def test_the_cookie_opens_the_page_alone(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers={"Cookie": COOKIE}) as browser:
        assert browser.get("/api/models").status_code == 401
        assert browser.get("/_stcore/health").status_code == 200
        # What else Streamlit answers is not served.
        for address in ("/_stcore/metrics", "/_stcore/agent/mcp", "/_stcore/script-health-check", "/index.html", "/x"):
            assert browser.get(address).status_code == 401, address
            found = browser.get(address, headers={"Authorization": f"Bearer {KEY}"})
            assert (found.status_code, found.headers["content-type"]) == (404, "application/json"), address


@pytest.mark.parametrize(
    "address", ["/favicon.png", "/media/a.png", "/_stcore/host-config", "/_stcore/bidi-components/a"]
)
def test_what_the_page_is_made_of_asks_for_the_key_too(server: Server, address: str) -> None:
    assert httpx.get(f"{server.url}{address}").status_code == 401


def test_a_websocket_needs_the_key_and_an_origin_of_ours(server: Server) -> None:
    assert handshake(server) == 403
    assert handshake(server, Cookie=COOKIE) == 101
    assert handshake(server, Cookie=COOKIE, Origin=server.url) == 101
    assert handshake(server, Cookie=COOKIE, Origin="https://elsewhere.example") == 403


def test_an_upload_from_elsewhere_is_refused(server: Server) -> None:
    headers = {"Cookie": COOKIE, "Origin": "https://elsewhere.example"}
    answer = httpx.put(f"{server.url}/_stcore/upload_file/a/b", headers=headers, files={"file": b"x"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "foreign_origin")


def test_a_page_that_dies_is_started_again_and_the_api_does_not_notice(server: Server) -> None:
    def page() -> int:
        [found] = [one.pid for one in psutil.Process(server.process.pid).children() if "app.ui" in one.cmdline()]
        return found

    first = page()
    os.kill(first, signal.SIGKILL)
    assert httpx.get(f"{server.url}/livez").status_code == 200
    with httpx.Client(base_url=server.url, headers={"Cookie": COOKIE}) as browser:
        wait_for(lambda: browser.get("/").status_code == 200, 60, "the page")
    assert page() != first
    assert "the page's process ended with code -9" in server.log
