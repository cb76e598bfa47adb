"""The application on Ray, over HTTP, with two replicas of fake models: what the server of one machine promises."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak.hostile import Row
from benchmarks.soak.wire import exchange, request
from tests.conftest import HAS_RAY
from tests.e2e.test_bad_input import ROWS

if not HAS_RAY:
    pytest.skip("Ray is an extra that is not installed", allow_module_level=True)

REPLICAS, QUEUE_SIZE = 2, 3  # as tests/cluster.py starts it
PATIENCE = 120.0  # seconds; only keeps a broken cluster from hanging the suite
GOOD = {"prompt": "a", "width": 64, "height": 64, "steps": 2, "seed": 1}
LONG = {**GOOD, "model": "slow", "steps": 150, "num_images": 10}  # 30 seconds: it does not end by itself in a test


def wait_for(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (result := found()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.05)
    return result


def telemetry(client: httpx.Client) -> dict[str, Any]:
    seen: dict[str, Any] = client.get("/api/telemetry").json()
    return seen


def idle(client: httpx.Client) -> bool:
    seen = telemetry(client)
    ready = sum(device["state"] == "ready" for device in seen["devices"])
    return ready == REPLICAS and not seen["pending_count"] + seen["running_count"]


def metrics(client: httpx.Client) -> dict[str, float]:
    """By name and labels, as they are written."""
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


@pytest.fixture
def client(cluster: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.address, timeout=PATIENCE) as client:
        wait_for(lambda: idle(client), "an idle cluster")
        yield client


def test_both_replicas_are_ready_and_draw(client: httpx.Client) -> None:
    assert client.get("/readyz").json()["workers"] == {"replica 0": "ready", "replica 1": "ready"}
    answer = client.post("/api/generate", json={**GOOD, "steps": 20, "deepcache_enabled": True})
    assert answer.status_code == 200
    assert (answer.json()["cache"]["computed"], answer.json()["cache"]["reused"]) == (7, 13)
    picture = client.post("/api/generate", json=GOOD, headers={"accept": "image/png"})
    assert picture.content.startswith(b"\x89PNG")


def test_metrics_have_the_names_that_one_machine_has(client: httpx.Client) -> None:
    from app.http.pages import exposition
    from app.metrics import Metrics
    from tests.app.fakes import FakeEngine

    engine = FakeEngine()
    local = exposition(Metrics(), engine).decode()
    named = [
        {line for line in text.splitlines() if line.startswith("# TYPE") and "_created" not in line}
        for text in (local, client.get("/metrics").text)
    ]
    assert named[0] == named[1]


def test_two_jobs_run_at_a_time(client: httpx.Client) -> None:
    jobs = [client.post("/api/jobs", json=LONG).json()["id"] for _ in range(2)]
    wait_for(lambda: telemetry(client)["running_count"] == 2, "two running jobs")
    for job in jobs:
        assert client.delete(f"/api/jobs/{job}").json()["state"] == "cancelled"


def test_a_job_tells_of_its_steps(client: httpx.Client) -> None:
    job = client.post("/api/jobs", json={**GOOD, "steps": 6, "deepcache_enabled": True}).json()["id"]
    with client.stream("GET", f"/api/jobs/{job}/events") as events:
        lines = list(events.iter_lines())
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [name for name in names if name != "queued"] == ["running", *["progress"] * 6, "done"]
    assert [event["decision"] for name, event in zip(names, data, strict=True) if name == "progress"] == [*"CRRCRR"]
    assert client.get(f"/api/jobs/{job}").json()["result"]["cache"]["decisions"] == "CRRCRR"


def test_a_cancelled_job_leaves_its_worker_at_the_next_step(client: httpx.Client) -> None:
    job = client.post("/api/jobs", json=LONG).json()["id"]
    wait_for(lambda: client.get(f"/api/jobs/{job}").json()["state"] == "running", "a running job")
    assert client.delete(f"/api/jobs/{job}").json()["state"] == "cancelled"
    wait_for(lambda: idle(client), "idle workers")  # the job had half a minute to go
    with ThreadPoolExecutor(REPLICAS) as pool:
        answers = list(pool.map(lambda _: client.post("/api/generate", json=GOOD).status_code, range(REPLICAS)))
    assert answers == [200] * REPLICAS


def test_the_job_of_a_client_that_leaves_is_cancelled(client: httpx.Client) -> None:
    with httpx.Client(base_url=client.base_url) as leaving, pytest.raises(httpx.ReadTimeout):
        leaving.post("/api/generate", json=LONG, timeout=httpx.Timeout(PATIENCE, read=0.5))
    wait_for(lambda: idle(client), "idle workers")


def test_a_job_of_the_jobs_endpoint_outlives_the_request_that_made_it(client: httpx.Client) -> None:
    with httpx.Client(base_url=client.base_url) as other:
        job = other.post("/api/jobs", json={**GOOD, "model": "slow", "steps": 20}).json()["id"]
    ended = wait_for(lambda: (seen := client.get(f"/api/jobs/{job}").json())["state"] != "running" and seen, "its end")
    wait_for(lambda: client.get(f"/api/jobs/{job}").json()["state"] == "done", f"success after {ended['state']}")


def test_past_the_queue_s_bound_everybody_is_refused(client: httpx.Client) -> None:
    """Five times what the replicas take at once."""
    answers = [client.post("/api/jobs", json=LONG) for _ in range(5 * REPLICAS)]
    accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
    refused = [answer for answer in answers if answer.status_code == 429]
    try:
        assert len(accepted) == REPLICAS + QUEUE_SIZE
        assert len(accepted) + len(refused) == len(answers)
        assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
        assert refused[0].json()["error"]["type"] == "queue_full"
        wait_for(lambda: telemetry(client)["running_count"] == REPLICAS, "busy replicas")
        assert telemetry(client)["pending_count"] == QUEUE_SIZE
    finally:
        for job in reversed(accepted):
            client.delete(f"/api/jobs/{job}")


@pytest.mark.parametrize(
    ("model", "status", "kind"),
    [("hungry", 503, "out_of_memory"), ("dies", 503, "worker_lost"), ("broken", 503, "model_unavailable")],
)
def test_after_a_job_that_failed_a_small_one_works(client: httpx.Client, model: str, status: int, kind: str) -> None:
    failed = client.post("/api/generate", json={**GOOD, "model": model})
    assert (failed.status_code, failed.json()["error"]["type"]) == (status, kind)
    assert client.post("/api/generate", json=GOOD).status_code == 200


@pytest.mark.parametrize("whole", [False, True], ids=["its worker process", "the replica itself"])
def test_killed_under_load_every_request_is_answered_and_the_metrics_tell(client: httpx.Client, whole: bool) -> None:
    before = metrics(client)
    pids = [device["pid"] for device in telemetry(client)["devices"]]
    victim = psutil.Process(pids[0]).parent() if whole else psutil.Process(pids[0])
    assert victim is not None

    def ask(seed: int) -> httpx.Response:
        return client.post("/api/generate", json={**GOOD, "model": "slow", "steps": 40, "seed": seed})

    with ThreadPoolExecutor(REPLICAS + QUEUE_SIZE) as pool:
        answers = [pool.submit(ask, seed) for seed in range(REPLICAS + QUEUE_SIZE)]
        wait_for(lambda: telemetry(client)["running_count"] == REPLICAS, "busy replicas")
        os.kill(victim.pid, signal.SIGKILL)
        for answer in answers:
            got = answer.result()
            assert got.status_code == 200 or (got.status_code == 503 and int(got.headers["retry-after"]) > 0), got.text
    wait_for(lambda: idle(client), "both replicas")
    after = metrics(client)
    restarts = [
        sum(found[f"wavespeed_worker_restarts['replica {rank}']"] for rank in (0, 1)) for found in (before, after)
    ]
    assert restarts[1] > restarts[0]
    assert [after[f"wavespeed_worker_ready['replica {rank}']"] for rank in (0, 1)] == [1, 1]
    assert pids != [device["pid"] for device in telemetry(client)["devices"]]
    assert client.post("/api/generate", json=GOOD).status_code == 200


# Ray's proxy reads a header however long it is and waits for its end: docs/scale.md asks for a proxy before it.
UNBOUNDED = "a header without end"


@pytest.mark.parametrize("row", [row for row in ROWS if row.name != UNBOUNDED], ids=lambda row: row.name)
def test_bad_input_is_answered_as_it_should(cluster: Any, row: Row) -> None:
    url = urlsplit(cluster.address)
    address = (url.hostname or "", url.port or 0)
    answer = exchange(address, row.parts, leave=row.leave)
    assert row.accepts(answer), answer
    alive = exchange(address, [request(b"", method="GET", path="/livez")])
    assert alive is not None
    assert alive.status == 200
