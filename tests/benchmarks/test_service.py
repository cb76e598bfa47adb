"""The benchmarks of one service, on one with fake models: what they ask for, compare and work out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL.Image import Image

from app.client import Client
from benchmarks import batching, cost
from benchmarks.server import Server, running, wait_for
from benchmarks.soak.clients import Crowd, good_requests
from benchmarks.soak.hostile import fields
from models.base import GenerationParams
from tests.app.fakes import painted


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(("-m", "tests.e2e.fake_server")) as server:
        yield server


def fake(fields: Any, seed: int) -> Image:
    """What the fake models paint of a request with that seed."""
    given = {name: fields[name] for name in ("prompt", "width", "height", "steps")}
    return painted(GenerationParams(**given), [seed])[0]


def processed(server: Server) -> int:
    count: int = server.get("/api/telemetry").json()["requests_processed"]
    return count


def test_a_request_is_held_against_the_bare_call_of_the_same(server: Server) -> None:
    called: list[int] = []

    def draw(asked: Sequence[Any]) -> list[Image]:
        (fields,) = asked
        called.append(fields["seed"])
        return [fake(fields, 100 if fields["seed"] == 5 else fields["seed"])]  # one is wrong

    before = processed(server)
    with server.client() as client:
        found = cost.pairs(client, draw, [cost.request(seed, 2, 64) for seed in range(7)])
    assert called == list(range(7))
    assert [pair["same"] for pair in found] == [True, True, True, False, True]  # the first two warm up
    assert all(pair["drawing"] + pair["call"] == pytest.approx(600) for pair in found), "what the fake says it took"
    assert all(pair["request"] > 0 and pair["call"] > 0 and pair["encoding"] > 0 for pair in found)
    assert processed(server) == before + 7


def test_what_the_service_adds_is_worked_out_pair_by_pair() -> None:
    rows = [(110, 95, 5, 97), (130, 100, 6, 108), (125, 112, 4, 115)]  # adds 10, 24 and 9
    found = cost.figures([{**cost.parted(*row), "same": row[0] != 130} for row in rows])
    assert (found["request"], found["call"], found["encoding"]) == (125, 100, 5)
    assert found["added"] == [9.5, 10, 17]
    assert (found["drawing"], found["around"]) == (3, 8)
    assert (found["same_pictures"], found["pairs"]) == (2, 3)
    assert [claim.holds for claim in cost.claims(found)] == [False, True, None, None]
    found["added"][1] = 10.1
    assert not cost.claims(found)[1].holds


def test_neighbouring_requests_have_other_prompts() -> None:
    assert len(set(cost.PROMPTS)) == len(cost.PROMPTS) == 150
    assert all(one != other for one, other in pairwise(cost.PROMPTS))


def test_requests_at_once_are_counted_and_their_pictures_kept_apart(server: Server) -> None:
    found = batching.at_once(server, clients=3, requests=6, steps=2, cached=True)
    assert found["images_per_batch"] == 1  # this server draws each by itself
    assert found["images_per_second"] > 0
    for number, picture in enumerate(found["pictures"]):
        assert np.array_equal(picture, np.asarray(fake(cost.request(number, 2), number)))
    assert batching.apart(found["pictures"], found["pictures"]) == 0
    assert batching.apart([[[0, 9]]], [[[4, 2]]]) == 7


def test_a_crowd_asks_in_all_ways_and_leaves_nothing_behind(server: Server) -> None:
    with Client(server.url) as client:
        expected = {"uncached": client.generate(**good_requests()["uncached"])}
        crowd = Crowd(server, client, expected, [fields("width 7", '"width": 7')])
        crowd.besiege(1.0, killing=False)
    wait_for(server.idle, 60, "an idle server")
    assert crowd.faults == []
    assert {"good 200, the quiet server's bytes", "odd or bad 422", "left"} <= set(crowd.answers)
