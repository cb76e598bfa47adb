"""Whose word on the peer's address counts: that of the proxies which the operator names, and nobody else's."""

from __future__ import annotations

import threading

import httpx
import pytest

from benchmarks.server import running, wait_for

BODY = {"prompt": "a", "width": 64, "height": 64, "steps": 150}
FORWARDED = {"X-Forwarded-For": "10.9.9.9"}


@pytest.mark.parametrize(("proxies", "seen"), [({}, 1), ({"WAVESPEED_PROXIES": "127.0.0.0/8"}, 0)])
def test_a_caller_is_who_connects_unless_a_named_proxy_says_otherwise(proxies: dict[str, str], seen: int) -> None:
    with running(("-m", "tests.e2e.fake_server"), **proxies) as server:
        host, port = server.address
        url = f"http://{host}:{port}/sdapi/v1"

        def draw() -> None:
            override = {"override_settings": {"model": "slow"}}
            httpx.post(f"{url}/txt2img", json={**BODY, **override}, timeout=60)

        drawing = threading.Thread(target=draw)
        drawing.start()

        def jobs(**headers: str) -> int:
            return int(httpx.get(f"{url}/progress", headers=headers, timeout=60).json()["state"]["job_count"])

        wait_for(lambda: jobs() == 1, 30, "a job under way")
        assert jobs(**FORWARDED) == seen
        httpx.post(f"{url}/interrupt", headers=FORWARDED, timeout=60)
        assert jobs() == 1 - seen
        httpx.post(f"{url}/interrupt", timeout=60)
        drawing.join(60)
