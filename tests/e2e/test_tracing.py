"""What OpenTelemetry gets from a running server that is set up by the environment alone: FastAPI's own option."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from benchmarks.server import Server, running, wait_for

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

BODY = {"prompt": "a secret", "width": 64, "height": 64, "steps": 20, "deepcache_enabled": True}


class Collector(ThreadingHTTPServer):
    """Takes spans as an OTLP collector does, and keeps them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taker)
        self.spans: list[Span] = []
        self.bodies = b""

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


class Taker(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sent = ExportTraceServiceRequest.FromString(body)
        self.server.bodies += body
        scopes = [scope for resource in sent.resource_spans for scope in resource.scope_spans]
        self.server.spans += [span for scope in scopes for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(collector: Collector) -> Iterator[Server]:
    environment = {
        "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "50",  # milliseconds between two exports
        "WAVESPEED_LOG_FORMAT": "json",
    }
    with running(("-m", "tests.e2e.fake_server"), **environment) as server:
        yield server


def post(server: Server, path: str, **fields: object) -> httpx.Response:
    host, port = server.address
    return httpx.post(f"http://{host}:{port}{path}", json={**BODY, **fields}, timeout=60)


def attributes(span: Span) -> dict[str, Any]:
    return {item.key: getattr(item.value, str(item.value.WhichOneof("value"))) for item in span.attributes}


def span_of(collector: Collector, name: str, request_id: str) -> Span:
    def found() -> list[Span]:
        return [s for s in collector.named(name) if attributes(s).get("wavespeed.request_id") == request_id]

    [span] = wait_for(found, 30, f"a span {name}")  # type: ignore[misc]
    return span


def test_a_requests_span_has_the_jobs_id_and_what_the_cache_did(server: Server, collector: Collector) -> None:
    answer = post(server, "/api/generate").json()
    span = span_of(collector, "POST /api/generate", answer["request_id"])
    told = {name.removeprefix("wavespeed."): value for name, value in attributes(span).items()}
    assert (told["http.response.status_code"], told["outcome"], told["model"]) == (200, "ok", "fine")
    cache = answer["cache"]
    assert cache["reused"] == 13
    assert {name: told[name] for name in ("strategy", "computed", "reused", "hit_rate", "interval")} == {
        "strategy": "deepcache",
        "computed": cache["computed"],
        "reused": cache["reused"],
        "hit_rate": cache["hit_rate"],
        "interval": 3,
    }

    # The log tells of the same request, and leads to its trace.
    def told_in_log() -> list[dict[str, Any]]:
        lines = map(json.loads, server.log.rpartition("\n")[0].splitlines())
        return [line for line in lines if line["request_id"] == answer["request_id"] and "hit_rate" in line]

    [line] = wait_for(told_in_log, 30, "the log's line")  # type: ignore[misc]  # a thread writes it
    assert (line["trace_id"], line["reused"]) == (span.trace_id.hex(), 13)
    assert re.match(r"cache strategy=deepcache .*hit_rate=0\.65", line["message"])


def test_a_refusal_says_why(server: Server, collector: Collector) -> None:
    refused = post(server, "/api/generate", model="dies")
    assert refused.status_code == 503
    span = span_of(collector, "POST /api/generate", refused.json()["error"]["request_id"])
    assert attributes(span)["wavespeed.outcome"] == "worker_lost"
    assert span.status.code == span.status.STATUS_CODE_ERROR


def test_a_job_is_a_span_of_its_own_below_the_request_that_made_it(server: Server, collector: Collector) -> None:
    made = post(server, "/api/jobs", model="slow").json()["id"]
    request, job = span_of(collector, "POST /api/jobs", made), span_of(collector, "job", made)
    assert (job.parent_span_id, job.trace_id) == (request.span_id, request.trace_id)
    assert attributes(job)["wavespeed.hit_rate"] == 0.65
    assert job.end_time_unix_nano > request.end_time_unix_nano


def test_polls_make_no_spans_and_no_span_holds_a_prompt(server: Server, collector: Collector) -> None:
    assert server.get("/metrics").status_code == 200
    assert server.get("/api/models").status_code == 200
    wait_for(lambda: collector.named("GET /api/models"), 30, "the span of a look at the models")
    assert {span.name for span in collector.spans} <= {
        "POST /api/generate", "POST /api/jobs", "job", "GET /api/models", "GET /api/telemetry"
    }  # fmt: skip
    assert b"secret" not in collector.bodies
