"""Every line of bad input against a server that runs: its answer, no 500, no hang, and all well afterwards."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.report import ROOT
from benchmarks.server import Server, wait_for
from benchmarks.soak.hostile import Row, fields, picture, rows, running
from benchmarks.soak.wire import Answer, exchange, request
from tests.app.test_bad_input import NOT_A_NUMBER, OUT_OF_BOUNDS, UNKNOWN_SAMPLER, WRONG_TYPE
from tests.app.test_pictures import REFUSED, png

FAKE = ("-m", "tests.e2e.fake_server")
GOOD = {"prompt": "a", "width": 64, "height": 64, "steps": 2, "seed": 1}


VALUES = [(field, value) for field, value, *_ in OUT_OF_BOUNDS + NOT_A_NUMBER + WRONG_TYPE + UNKNOWN_SAMPLER]
LORAS = ("..", "../outside", "/etc/passwd", "%2e%2e", "a\\b", "pickle.ckpt", "pickle", "link", "owner/repository")
LISTED = [
    *rows(),
    *(fields(f"LoRA {name}", f'"loras": {json.dumps([{"name": name}])}') for name in LORAS),
    picture("50 000²", png(50_000, 50_000, rows=b"\0")),
]
ROWS = [
    *LISTED,
    *(fields(f"{field} is {value}", f'"{field}": {value}') for field, value in VALUES),
    *(picture(f"with {name}", make()) for name, (make, _) in REFUSED.items()),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(FAKE, lay_out, WAVESPEED_QUEUE_SIZE="1") as server:
        yield server


def lay_out(folder: Path) -> None:
    """LoRAs that must not be read: a pickle, and a link that leads out of their folder."""
    loras = folder / "loras"
    loras.mkdir()
    (loras / "pickle.ckpt").write_bytes(b"\x80\x04.")
    (folder / "outside.safetensors").write_bytes(bytes(16))
    (loras / "link.safetensors").symlink_to(folder / "outside.safetensors")


def ask(server: Server, **body: object) -> Answer:
    answer = exchange(server.address, [request(json.dumps({**GOOD, **body}))])
    assert answer is not None
    return answer


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_answered_as_it_should(server: Server, row: Row) -> None:
    answer = exchange(server.address, row.parts, leave=row.leave)
    assert row.accepts(answer), answer
    assert server.get("/livez").status_code == 200


def test_the_document_lists_what_is_asked() -> None:
    lines = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8").partition("## The table")[2].splitlines()
    told = dict(line[2:].split(" | ", 1) for line in lines if line.startswith("| ") and "| status |" not in line)
    assert told.keys() == {row.name for row in LISTED}
    for row in LISTED:
        without = "the client left" if row.leave else "closed"
        words = {without if status is None else str(status) for status in row.status}
        status, kind = told[row.name].removesuffix("|").strip().split(" |")
        assert status in words, row.name
        assert row.type is None or kind.strip() == f"`{row.type}`", row.name


def test_afterwards_all_is_well(server: Server) -> None:
    wait_for(server.idle, 60, "an idle server")
    before = ask(server)
    assert before.status == 200
    assert server.get("/api/telemetry").json()["devices"][0]["restarts"] == 0
    counted = re.findall(
        r'^wavespeed_requests_total{.*outcome="internal"} (.+)$', server.get("/metrics").text, re.MULTILINE
    )
    assert set(counted) == {"0.0"}
    assert "Traceback" not in server.log
    with running(FAKE) as quiet:
        assert json.loads(ask(quiet).body)["image"] == json.loads(before.body)["image"]


def test_a_full_queue_says_when_to_come_back(server: Server) -> None:
    def job(**body: object) -> str:
        answer = exchange(server.address, [request(json.dumps({**GOOD, **body}), path="/api/jobs")])
        assert answer is not None
        return str(json.loads(answer.body)["id"])

    wait_for(server.idle, 60, "an idle server")
    jobs = [job(model="slow", steps=150, num_images=10)]  # half a minute, unless it is cancelled
    wait_for(lambda: server.get("/api/telemetry").json()["running_count"] == 1, 60, "a running job")
    jobs.append(job())
    refused = ask(server)
    assert (refused.status, refused.type) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    for identity in reversed(jobs):
        exchange(server.address, [request(b"", method="DELETE", path=f"/api/jobs/{identity}")])
    wait_for(server.idle, 60, "an idle server")
    assert ask(server).status == 200


@pytest.mark.parametrize(("model", "status", "kind"), [("hungry", 503, "out_of_memory"), ("dies", 503, "worker_lost")])
def test_after_a_job_that_failed_a_small_one_works(server: Server, model: str, status: int, kind: str) -> None:
    failed = ask(server, model=model)
    assert (failed.status, failed.type) == (status, kind)
    wait_for(server.idle, 60, "a worker")
    assert ask(server).status == 200


def test_a_full_disk_costs_log_lines_and_nothing_else(server: Server) -> None:
    """The system refuses to let the server's files grow, as a full disk does."""
    first = json.loads(ask(server).body)["request_id"]
    wait_for(lambda: first in server.log, 30, "the log's line")  # which is written beside the answer
    size = len(server.log.encode())
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        assert [ask(server, seed=seed).status for seed in range(5)] == [200] * 5
        assert ask(server, width=7).status == 422
        assert len(server.log.encode()) == size  # read before the limit is lifted: the log's thread may come later
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answer = ask(server)
    wait_for(lambda: json.loads(answer.body)["request_id"] in server.log, 30, "the log's next line")
