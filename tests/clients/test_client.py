"""Our own Python client against a server on a socket, and against answers that a network may give."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import httpx2
import pytest
from PIL import Image

from app.client import TRIES, ApiError, Client, ControlField, Fields, LoraField, Unreachable
from app.http.schemas import Control, GenerateRequest, Lora
from benchmarks.server import Server, wait_for
from models.embedded import CONTROLNETS
from tests.clients.conftest import KEY

CACHED: dict[str, Any] = {"deepcache_enabled": True, "deepcache_schedule": "uniform", "steps": 6}


def address_of(server: Server) -> str:
    host, port = server.address
    return f"http://{host}:{port}"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(address_of(server)) as client:
        yield client


def bare(hint: Any) -> object:
    """Without the bounds that pydantic keeps beside a type."""
    if get_origin(hint) is Annotated:
        return bare(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return frozenset(bare(part) for part in get_args(hint))
    return hint


def test_its_fields_are_the_service_s() -> None:
    hints = get_type_hints(Fields)
    assert set(hints) == set(GenerateRequest.model_fields) - {"prompt"}
    types = {name: GenerateRequest.model_fields[name].annotation for name in hints}
    assert {name for name in hints if bare(hints[name]) != bare(types[name])} == {"loras", "control"}
    assert set(get_type_hints(LoraField)) == set(Lora.model_fields)
    assert set(get_type_hints(ControlField)) == set(Control.model_fields)


def test_pictures_and_report(client: Client) -> None:
    drawn = client.generate("a misty forest", num_images=2, seed=258, **CACHED)
    assert [Image.open(io.BytesIO(file)).getpixel((0, 0)) for file in drawn.images] == [(2, 1, 14), (3, 1, 14)]
    assert drawn.image == drawn.images[0]
    assert (drawn.report["seeds"], drawn.report["cache"]["decisions"]) == ([258, 259], "CRRCRR CRRCRR")


def test_a_job_s_events_and_its_result(client: Client) -> None:
    job = client.submit("a", enable_preview=True, **CACHED)
    events = list(job.events())
    assert [event.number for event in events] == sorted({event.number for event in events})
    steps = [event.data["decision"] for event in events if event.name == "progress"]
    assert (steps, events[-1].name) == (list("CRRCRR"), "done")
    again = client.job(job.id)
    assert (again.state, again.ended) == ("done", True)
    assert again.result() == job.result()
    assert job.result().report["cache"]["hit_rate"] == 0.6667


def test_a_key_of_one_s_own_makes_one_job(client: Client) -> None:
    first, second = (client.submit("a", idempotency_key="once", **CACHED) for _ in range(2))
    assert first.id == second.id


def test_a_job_is_cancelled(client: Client) -> None:
    job = client.submit("a", model="slow", steps=150, num_images=10)
    assert job.cancel().state == "cancelled"
    with pytest.raises(ApiError) as caught:
        job.result()
    assert (caught.value.status, caught.value.type) == (409, "cancelled")
    done = client.submit("a")
    done.result()
    with pytest.raises(ApiError) as caught:
        done.cancel()
    assert caught.value.type == "job_finished"


@pytest.mark.parametrize(
    ("fields", "status", "kind", "field"),
    [
        ({"width": 513}, 422, "invalid", "width"),
        ({"model": "nothing"}, 404, "unknown_model", "model"),
        ({"fbcache_enabled": True}, 422, "incompatible", "fbcache_enabled"),
        ({"model": "hungry"}, 503, "out_of_memory", None),
    ],
)
def test_errors_say_what_the_service_said(
    client: Client, fields: dict[str, Any], status: int, kind: str, field: str | None
) -> None:
    with pytest.raises(ApiError) as caught:
        client.generate("a", **fields)
    error = caught.value
    assert (error.status, error.type, error.field) == (status, kind, field)
    assert len(error.request_id) == 32
    assert str(error) == error.message


@pytest.mark.parametrize("identity", ["nothing", "../models", "a/b", "%2e%2e"])
def test_a_job_that_is_not_there(client: Client, identity: str) -> None:
    with pytest.raises(ApiError, match=r"no such job|nothing at this address") as caught:
        client.job(identity)
    assert caught.value.status == 404


def test_what_the_service_has_and_does(client: Client) -> None:
    assert [row["name"] for row in client.models()[:2]] == ["tiny-sd", "tiny-flux"]
    assert client.adapters() == {"loras": [], "embeddings": [], "upscalers": [], "controlnets": [*CONTROLNETS]}
    assert client.telemetry()["worker_running"] is True


def test_a_key_opens_and_a_full_queue_says_when_to_come_back(locked: Server) -> None:
    with Client(address_of(locked)) as stranger, pytest.raises(ApiError, match="keys") as caught:
        stranger.telemetry()
    assert (caught.value.status, caught.value.type) == (401, "unauthorized")
    with Client(address_of(locked), key=KEY) as client:
        busy = client.submit("a", model="slow", steps=150, num_images=10)
        wait_for(lambda: client.telemetry()["running_count"] == 1, 60, "a running job")
        waiting = client.submit("a")
        with pytest.raises(ApiError) as caught:
            client.generate("a")
        assert (caught.value.status, caught.value.type) == (429, "queue_full")
        assert caught.value.retry_after is not None
        for job in (waiting, busy):
            job.cancel()


def answering(respond: Callable[[httpx2.Request], httpx2.Response]) -> Client:
    return Client("http://test", transport=httpx2.MockTransport(respond))


@pytest.mark.parametrize("body", ["<html>502 Bad Gateway</html>", "[]", '{"error": "no"}', ""])
def test_an_answer_that_is_not_the_service_s(body: str) -> None:
    with (
        answering(lambda request: httpx2.Response(502, text=body)) as client,
        pytest.raises(Unreachable, match="answered 502"),
    ):
        client.telemetry()


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "nothing", "http://[", "ftp://a"])
def test_where_nobody_is(address: str) -> None:
    with pytest.raises(Unreachable), Client(address) as client:
        client.models()


def sent(number: int, name: str, **data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\nid: {number}\n\n"


def test_a_broken_event_stream_is_taken_up_where_it_broke() -> None:
    asked = []

    def respond(request: httpx2.Request) -> httpx2.Response:
        if not request.url.path.endswith("/events"):
            return httpx2.Response(200, json={"id": "x", "state": "running"})
        asked.append(request.headers.get("last-event-id"))
        text = [
            sent(1, "queued") + sent(2, "progress", step=1) + 'event: progress\ndata: {"st',
            "",
            sent(3, "progress", step=2) + sent(4, "done"),
        ][len(asked) - 1]
        return httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})

    with answering(respond) as client:
        assert [event.number for event in client.job("x").events()] == [1, 2, 3, 4]
    assert asked == [None, "2", "2"]


def test_an_event_stream_that_stays_away_is_given_up() -> None:
    asked = []

    def respond(request: httpx2.Request) -> httpx2.Response:
        if not request.url.path.endswith("/events"):
            return httpx2.Response(200, json={"id": "x", "state": "running"})
        asked.append(request)
        raise httpx2.ConnectError("gone")

    with answering(respond) as client, pytest.raises(Unreachable, match="gone"):
        list(client.job("x").events())
    assert len(asked) == TRIES
