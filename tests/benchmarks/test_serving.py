"""Loads and their figures, each held against a computation written here; overload against a server that runs."""

from __future__ import annotations

import asyncio
import json
import math
import random
import selectors
from collections.abc import Coroutine, Iterable
from itertools import pairwise, repeat
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from typer.testing import CliRunner

from benchmarks.server import running
from benchmarks.serving.__main__ import cli
from benchmarks.serving.api import Answer, Native, OpenAI
from benchmarks.serving.figures import figures, percentile
from benchmarks.serving.load import Sample, closed_loop, open_loop, poisson
from benchmarks.serving.mix import MIXED, SQUARE, drawn, with_caches, with_fields
from benchmarks.serving.mix import Request as Asked
from benchmarks.serving.service import spacing
from benchmarks.serving.target import Load, Run, Target, reaching
from benchmarks.serving.watch import Look
from tests.benchmarks.lindley import lindley

ONE = Asked("one", {"prompt": "a"})


class Leap(selectors.DefaultSelector):
    """Waits by moving the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing is going to happen any more"
        self.now += timeout
        return list(super().select(0))


class LeapingLoop(asyncio.SelectorEventLoop):
    """Sleeps take no time, and everything happens exactly when it is due."""

    def __init__(self) -> None:
        self.leap = Leap()
        super().__init__(self.leap)

    def time(self) -> float:
        return self.leap.now


def in_no_time(work: Coroutine[Any, Any, list[Sample]]) -> list[Sample]:
    loop = LeapingLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


class OneWorker:
    """Answers one request after the other, each in the next of `seconds`."""

    def __init__(self, seconds: Iterable[float]) -> None:
        self.seconds = iter(seconds)
        self.lock = asyncio.Lock()
        self.most = self.here = 0

    async def __call__(self, request: Asked) -> Answer:
        self.here += 1
        self.most = max(self.most, self.here)
        async with self.lock:
            await asyncio.sleep(next(self.seconds))
        self.here -= 1
        return Answer(200, 1)


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


def test_an_open_loop_counts_from_the_schedule_through_a_stall() -> None:
    """One request that takes 20 seconds; a client that waited for it before asking on would see one bad latency."""
    arrivals = poisson(2.0, 60.0, seed=1)
    services = [20.0 if number == 30 else 0.2 for number in range(len(arrivals))]
    samples = in_no_time(open_loop(OneWorker(services), arrivals, repeat(ONE)))
    expected = lindley(arrivals, services)
    assert [one.latency for one in samples] == pytest.approx(expected)
    assert [one.sent for one in samples] == pytest.approx(arrivals)
    assert sum(one.latency > 5 for one in samples) > 20


def test_a_client_that_is_held_up_does_not_make_the_server_look_fast() -> None:
    arrivals = [0.0, 0.1, 0.2, 0.3]

    class HeldUp:
        """A pool of one connection: a request is sent when the one before is answered."""

        def __init__(self) -> None:
            self.worker = OneWorker(repeat(1.0))
            self.pool = asyncio.Semaphore(1)

        async def __call__(self, request: Asked) -> Answer:
            async with self.pool:
                return await self.worker(request)

    samples = in_no_time(open_loop(HeldUp(), arrivals, repeat(ONE)))
    assert [one.latency for one in samples] == pytest.approx([1.0, 1.9, 2.8, 3.7])


def test_a_closed_loop_keeps_its_clients_busy_and_no_more() -> None:
    worker = OneWorker(repeat(0.5))
    samples = in_no_time(closed_loop(worker, 3, repeat(ONE), seconds=10))
    assert worker.most == 3
    assert [one.latency for one in samples[3:-3]] == pytest.approx([1.5] * (len(samples) - 6))
    assert len(in_no_time(closed_loop(OneWorker(repeat(0.5)), 3, repeat(ONE), count=7))) == 7


def test_two_clients_show_how_long_a_request_occupies_the_worker() -> None:
    services = [0.3, 0.5, 0.2, 0.7, 0.4]
    samples = in_no_time(closed_loop(OneWorker(services), 2, repeat(ONE), count=5))
    assert spacing(samples) == pytest.approx(services[1:])


def sample(at: float, latency: float, status: int = 200, **answer: Any) -> Sample:
    told = {"images": 1 if status == 200 else 0, "retry_after": status == 429} | answer
    return Sample("one", at, at + 0.01, at + latency, Answer(status, **told))


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
    found = figures(samples, [(1.0, 10.0)], objective=2.0)
    assert (found.requests, found.statuses) == (6, {"0": 1, "200": 3, "429": 2})
    assert found.offered == pytest.approx(6 / 9)
    assert found.finished == pytest.approx((5 + 1 + 1) / 9)
    assert found.latency is not None
    assert (found.latency.mean, found.latency.p50, found.latency.p99) == pytest.approx((5.5 / 3, 1.5, 3.0))
    assert found.wait is not None
    assert (found.wait.mean, found.wait.p95) == (0.5, 0.75)
    assert (found.within, found.goodput) == pytest.approx((2 / 6, 2 / 9))  # refused and lost ones are misses
    assert found.hit_rate == 0.5
    assert found.without_retry_after == 1
    assert found.late == pytest.approx(0.01)


def test_rounds_are_joined_and_their_median_counts() -> None:
    load = Load(name="x", mix=SQUARE, seconds=4.0, warm_up=2.0, objective=2.0, rate=1.0)
    slow, usual, quick = (
        Run(load, [sample(at, 0.5) for at in (0.1, *times)], [Look(3.0, 1, 1, None)])
        for times in ([2.1], [2.1, 2.6], [2.1, 2.2, 2.3, 2.4, 3.9])
    )
    whole = Run.joined([slow, usual, quick])
    assert [end for window in whole.windows for end in window] == pytest.approx([2, 4, 6, 8, 10, 12])
    assert (whole.figures.requests, whole.figures.seconds) == (8, pytest.approx(6.0))
    assert whole.figures.finished == pytest.approx(1.0)  # of 0.5, 1 and 2 a second; the last one ends after its round
    assert [look.at for look in whole.looks] == [3.0, 7.0, 11.0]


def test_kinds_come_as_often_as_they_should_and_each_asks_for_something_else() -> None:
    requests = drawn(MIXED, seed=3)
    first = [next(requests) for _ in range(2000)]
    again = drawn(MIXED, seed=3)
    assert first == [next(again) for _ in range(2000)]
    for kind in MIXED:
        share = sum(one.kind == kind.name for one in first) / 2000
        assert share == pytest.approx(kind.weight, abs=4 * math.sqrt(kind.weight * (1 - kind.weight) / 2000))
    assert len({one.fields["seed"] for one in first}) == 2000
    assert len({one.fields["prompt"] for one in first}) > 100


def test_every_kind_is_a_request_that_the_service_takes() -> None:
    from app.http.schemas import parse

    for caches in (False, True):
        for kind in with_caches(with_fields(MIXED, steps=8), caches):
            fields = parse(dict(next(drawn([kind], 0)).fields))
            flux = "flux" in kind.name
            assert (fields.fbcache_enabled if flux else fields.deepcache_enabled) is caches


def peer(seen: list[dict[str, Any]]) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/images/generations")
    async def images(request: Request) -> Any:
        body = await request.json()
        seen.append(body)
        if body["prompt"].startswith("a starry"):
            return Response(status_code=429, headers={"retry-after": "1"})
        if body["prompt"].startswith("a snowy"):
            return {"data": [{"url": "https://elsewhere"}]}
        return {"created": 1, "data": [{"b64_json": "AAAA"}] * body["n"]}

    return app


async def test_a_peer_is_asked_in_openai_s_tongue() -> None:
    seen: list[dict[str, Any]] = []
    transport = httpx.ASGITransport(app=peer(seen))
    async with httpx.AsyncClient(transport=transport, base_url="http://peer") as client:
        target = Target(client, OpenAI({"num_inference_steps": 4}))
        mix = with_fields(SQUARE, num_images=2)
        load = Load(name="x", mix=mix, seconds=0.5, warm_up=0.0, objective=2.0, rate=80.0)
        run = await target.run(load)
    asked = [body["prompt"].split()[1] for body in seen]
    expected = {"429": asked.count("starry"), "0": asked.count("snowy")}
    expected["200"] = len(asked) - sum(expected.values())
    assert run.figures.statuses == expected
    assert all(count > 0 for count in expected.values())
    assert sum(one.answer.images for one in run.samples) == 2 * expected["200"]
    assert (run.figures.wait, run.figures.hit_rate, run.figures.without_retry_after) == (None, None, 0)
    assert {key: value for key, value in seen[0].items() if key != "prompt"} == {
        "n": 2, "size": "128x128", "response_format": "b64_json", "num_inference_steps": 4,
    }  # fmt: skip


async def test_overload_is_refused_and_its_queue_stays_bounded() -> None:
    places, rate, seconds = 4, 40.0, 1.5  # 0.1 s of steps a request: four times what the server can do
    mix = with_fields(SQUARE, model="slow", steps=5)
    with running(("-m", "tests.e2e.fake_server"), WAVESPEED_QUEUE_SIZE=str(places), LD_MAX_BATCH_SIZE="1") as server:
        host, port = server.address
        async with reaching(f"http://{host}:{port}", Native(), server.process.pid) as target:
            await target.warm(mix)
            run = await target.run(Load(name="x", mix=mix, seconds=seconds, warm_up=0.0, objective=2.0, rate=rate))
        load = ["load", "--url", f"http://{host}:{port}", "--clients", "1", "--seconds", "1", "--warm-up", "0"]
        asked = ["--extra", '{"model": "slow", "steps": 2}', "--pid", str(server.process.pid)]
        command = await asyncio.to_thread(CliRunner().invoke, cli, [*load, *asked])
    found, held = run.figures, run.held()
    assert found.statuses.keys() == {"200", "429"}
    assert found.statuses["429"] > found.statuses["200"] / 2
    assert found.without_retry_after == 0
    assert held["waiting_most"] <= places
    assert held["server_mb"] > 10
    assert held["workers_mb"] > 10
    by_command = json.loads(command.stdout.splitlines()[-1])
    assert by_command["figures"]["statuses"].keys() == {"200"}
    assert by_command["held"]["workers_mb"] > 10
    waits = [one.answer.queue for one in run.samples if one.answer.queue is not None]
    # A place is served at a time; one service more than there are places is room for what dispatching takes.
    assert max(waits) <= (places + 1) * held["service_longest"]


async def test_no_answer_is_counted_as_none() -> None:
    async with reaching("http://127.0.0.1:9", Native()) as target:
        run = await target.run(Load(name="x", mix=SQUARE, seconds=0.2, warm_up=0.0, objective=2.0, rate=20.0))
        assert run.figures.statuses.keys() <= {"0"}
        with pytest.raises(RuntimeError, match="answered 0, ConnectError"):
            await target.warm(SQUARE)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--rate", "1", "--clients", "1"], ["--rate", "1", "--extra", "[]"], ["--rate", "1", "--size", "512"]],
)
def test_a_load_that_cannot_be_is_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["load", "--url", "http://127.0.0.1:9", *arguments]).exit_code == 2
