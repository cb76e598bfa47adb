"""Loads and their figures, each held against a computation written here; overload against a server that runs."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from benchmarks.report import percentile
from benchmarks.server import Server, running
from benchmarks.serving import load as loads
from benchmarks.serving.__main__ import cli
from benchmarks.serving.load import Load, Sample, Target, entry, figures, held, latency, poisson
from benchmarks.serving.requests import MIXED, SQUARE, drawn, with_fields
from benchmarks.serving.scenarios import spacing
from tests.benchmarks.lindley import lindley

needs_locust = pytest.mark.skipif(find_spec("locust") is None, reason="needs the bench extra")
PICTURE = {"image": "AAAA", "timings": {"queue_seconds": 0, "total_seconds": 0}, "cache": {"computed": 1, "reused": 0}}
Answer = Callable[[dict[str, Any]], tuple[int, dict[str, str], object]]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The address of a server whose answers `answer` gives: status, headers and body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            status, headers, body = answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class OneWorker:
    """Draws one request after the other, each for at least `seconds` of its number."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds, self.worker, self.guard = seconds, threading.Lock(), threading.Lock()
        self.most = self.here = self.drawn = 0

    def __call__(self, body: dict[str, Any]) -> tuple[int, dict[str, str], object]:
        with self.guard:
            self.here += 1
            self.most = max(self.most, self.here)
        with self.worker:
            self.drawn += 1
            time.sleep(self.seconds(self.drawn - 1))
        with self.guard:
            self.here -= 1
        return 200, {}, PICTURE


def a_load(**given: Any) -> Load:
    usual = {"name": "x", "mix": SQUARE, "seconds": 2.0, "warm_up": 0.0, "objective": 2.0}
    return Load(**{**usual, **given})


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 100])
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(count: int) -> None:
    source = random.Random(count)
    values = [source.random() for _ in range(count)]
    for share in (0.5, 0.95, 0.99):
        least = min(value for value in values if sum(other <= value for other in values) >= share * count - 1e-9)
        assert percentile(values, share) == least


def test_arrivals_are_poisson_and_the_seed_s() -> None:
    times = poisson(20, 500, seed=4)
    assert times == poisson(20, 500, seed=4) != poisson(20, 500, seed=5)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 500
    assert len(times) == 10_000
    counts = [sum(at <= time < at + 1 for time in times) for at in range(500)]
    mean = sum(counts) / 500
    dispersion = sum((count - mean) ** 2 for count in counts) / 499 / mean  # 1 for Poisson; its deviation √(2 / 499)
    assert dispersion == pytest.approx(1, abs=4 * math.sqrt(2 / 499))
    gaps = sorted(later - earlier for earlier, later in pairwise(times))
    assert gaps[len(gaps) // 2] == pytest.approx(math.log(2) / 20, rel=0.05)  # the median of an exponential


@needs_locust
@pytest.mark.parametrize("users", [1000, 1])
def test_an_open_loop_counts_from_the_schedule_through_a_stall(users: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request that takes a second; a client that waited for it before asking on would see one bad latency.

    So would one that is held up itself, with a single connection, if it counted from its own sending. A worker that is
    slower than it is told makes latencies longer, so what follows of its least times is a lower bound for them.
    """
    monkeypatch.setattr(loads, "MOST_USERS", users)
    arrivals = poisson(20.0, 2.0)
    services = [1.0 if number == 10 else 0.01 for number in range(len(arrivals))]
    with answering(OneWorker(services.__getitem__)) as url:
        samples, _ = Target(url).run(a_load(rate=20.0))
    assert [one["scheduled"] for one in samples] == arrivals
    # Two requests may reach the worker in another order than they were to be sent in; the k-th to leave it can not be
    # earlier than the k-th in order.
    left = sorted(one["scheduled"] + latency(one) for one in samples)
    earliest = [at + least for at, least in zip(arrivals, lindley(arrivals, services), strict=True)]
    assert all(time > least - 1e-3 for time, least in zip(left, earliest, strict=True))
    assert sum(latency(one) > 0.4 for one in samples) > 8
    assert {one["status"] for one in samples} == {200}


@needs_locust
def test_a_closed_loop_keeps_its_clients_busy_and_no_more() -> None:
    worker = OneWorker(lambda number: 0.05)
    with answering(worker) as url:
        samples, _ = Target(url).run(a_load(clients=3, seconds=1.0))
    assert worker.most == 3
    assert 3 <= len(samples) == worker.drawn <= 1 / 0.05 + 3
    assert all(one["sent"] == one["scheduled"] < 1.0 for one in samples)


def test_two_clients_show_how_long_a_request_occupies_the_worker() -> None:
    services = [0.3, 0.5, 0.2, 0.7]
    ends = [sum(services[: number + 1]) for number in range(4)]
    assert spacing([(0.0, end) for end in reversed(ends)]) == pytest.approx(services[1:])


def sample(at: float, seconds: float, status: int = 200, **answer: Any) -> Sample:
    told = {"images": 1 if status == 200 else 0, "retry_after": status == 429, "queue": None, "service": None}
    when = {"kind": "one", "scheduled": at, "sent": at + 0.01, "finished": at + seconds, "status": status}
    return {**when, **told, "computed": 0, "reused": 0, **answer}


def test_figures_are_those_of_the_window() -> None:
    samples = [
        sample(0.5, 9.0, images=5),  # asked in the warm-up, finished at 9.5: its pictures count, its latency does not
        sample(2.0, 1.0, queue=0.25, service=0.5, computed=3, reused=1),
        sample(3.0, 3.0, queue=0.75, service=0.5, computed=1, reused=3),
        sample(4.0, 0.1, 429),
        sample(5.0, 0.2, 429, retry_after=False),
        sample(6.0, 0.1, 0),
        sample(9.5, 1.5, images=2),  # finished after the end
    ]
    found = figures(samples, 1.0, 10.0, objective=2.0)
    assert (found["requests"], found["statuses"]) == (6, {"0": 1, "200": 3, "429": 2})
    assert found["offered"] == pytest.approx(6 / 9)
    assert found["finished"] == pytest.approx((5 + 1 + 1) / 9)
    assert [found["latency"][name] for name in ("mean", "p50", "p99")] == pytest.approx([5.5 / 3, 1.5, 3.0])
    assert (found["wait"]["mean"], found["wait"]["p95"]) == (0.5, 0.75)
    assert (found["within"], found["goodput"]) == pytest.approx((2 / 6, 2 / 9))  # refused and lost ones are misses
    assert found["hit_rate"] == 0.5
    assert found["without_retry_after"] == 1
    assert found["late"] == pytest.approx(0.01)


def test_a_closed_loop_counts_up_to_its_last_answer() -> None:
    samples = [sample(at, 0.5) for at in (0.1, 2.0, 3.9)]
    looks = [{"at": float(at), "server": 1, "workers": 1, "waiting": at} for at in range(4)]
    closed = entry(a_load(seconds=4.0, clients=1), samples, looks)["figures"]
    assert (closed["requests"], closed["finished"]) == (3, pytest.approx(3 / 4.4))
    opened = entry(a_load(seconds=4.0, warm_up=1.0, rate=1.0), samples, looks[:2])
    assert (opened["figures"]["requests"], opened["figures"]["finished"]) == (2, pytest.approx(1 / 3))
    assert opened["held"]["waiting_most"] == 1


def test_growth_is_of_medians_a_third_apart() -> None:
    def grown(*resident: int) -> Any:
        looks = [{"at": at, "server": of, "workers": 0, "waiting": 3} for at, of in enumerate(resident)]
        return held(looks, [])["server_growth"]

    assert grown(100, 100, 500, 100, 100, 100, 110, 110, 110) == pytest.approx(0.1)
    assert grown(100, 200) is None


def test_kinds_come_as_often_as_they_should_and_each_asks_for_something_else() -> None:
    requests = drawn(MIXED, seed=3)
    first = [next(requests) for _ in range(2000)]
    again = drawn(MIXED, seed=3)
    assert first == [next(again) for _ in range(2000)]
    for name, weight, _ in MIXED:
        share = sum(kind == name for kind, _ in first) / 2000
        assert share == pytest.approx(weight, abs=4 * math.sqrt(weight * (1 - weight) / 2000))
    assert len({fields["seed"] for _, fields in first}) == 2000
    assert len({fields["prompt"] for _, fields in first}) > 100


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """With four places, of which each request takes 0.1 s of steps."""
    with running(("-m", "tests.e2e.fake_server"), WAVESPEED_QUEUE_SIZE="4", LD_MAX_BATCH_SIZE="1") as server:
        yield server


def test_every_kind_is_a_request_that_the_service_takes(server: Server) -> None:
    target = Target(server.url)
    for caches in (False, True):
        for kind in with_fields(MIXED, caches, steps=2):
            assert (target.ask(next(drawn([kind], 0))[1])["reused"] > 0) is caches


@needs_locust
def test_a_200_without_its_pictures_is_none() -> None:
    seen: list[str] = []

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, str], object]:
        seen.append(body["prompt"].split()[1])
        if seen[-1] == "starry":
            return 429, {"retry-after": "1"}, {}
        return 200, {}, {**PICTURE, "image": ""} if seen[-1] == "snowy" else {**PICTURE, "images": ["AAAA"] * 2}

    load = a_load(seconds=0.5, rate=80.0)
    with answering(answer) as url:
        samples, looks = Target(url).run(load)
    found = entry(load, samples, looks)["figures"]
    expected = {"429": seen.count("starry"), "0": seen.count("snowy")}
    expected["200"] = len(seen) - sum(expected.values())
    assert found["statuses"] == expected
    assert all(count > 0 for count in expected.values())
    assert sum(one["images"] for one in samples) == 2 * expected["200"]
    assert found["without_retry_after"] == 0


@needs_locust
def test_overload_is_refused_and_its_queue_stays_bounded(server: Server) -> None:
    load = a_load(
        mix=with_fields(SQUARE, False, model="slow", steps=5), seconds=1.5, rate=40.0
    )  # four times what it can do
    target = Target(server.url, server.process.pid)
    target.warm(load.mix)
    samples, looks = target.run(load)
    found = entry(load, samples, looks)
    figures, held = found["figures"], found["held"]
    assert figures["statuses"].keys() == {"200", "429"}
    assert figures["statuses"]["429"] > figures["statuses"]["200"] / 2
    assert figures["without_retry_after"] == 0
    assert held["waiting_most"] <= 4
    assert held["server_mb"] > 10
    assert held["workers_mb"] > 10
    waits = [one["queue"] for one in samples if one["queue"] is not None]
    # A place is served at a time; one service more than there are places is room for what dispatching takes.
    assert max(waits) <= (4 + 1) * held["service_longest"]


@needs_locust
def test_one_load_by_the_command(server: Server) -> None:
    given = ["load", "--url", server.url, "--clients", "1", "--seconds", "1", "--warm-up", "0"]
    more = ["--fields", '{"model": "slow", "steps": 2}', "--pid", str(server.process.pid)]
    told = json.loads(CliRunner().invoke(cli, [*given, *more]).stdout.splitlines()[-1])
    assert told["figures"]["statuses"].keys() == {"200"}
    assert told["held"]["workers_mb"] > 10


@needs_locust
def test_no_answer_is_counted_as_none() -> None:
    target, load = Target("http://127.0.0.1:9"), a_load(seconds=0.2, rate=20.0)
    samples, _ = target.run(load)
    assert {one["status"] for one in samples} == {0}
    assert "refused" in samples[0]["error"]
    with pytest.raises(httpx.ConnectError):
        target.warm(SQUARE)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--rate", "1", "--clients", "1"], ["--rate", "1", "--fields", "[]"], ["--rate", "1", "--fields", "x"]],
)
def test_a_load_that_cannot_be_is_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["load", "--url", "http://127.0.0.1:9", *arguments]).exit_code == 2
