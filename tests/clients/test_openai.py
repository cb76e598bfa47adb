"""The `openai` package against a server on a socket: pictures, streams, models, and its own exceptions."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from benchmarks.server import Server, wait_for
from tests.clients.conftest import KEY

CACHED = {"deepcache_enabled": True, "deepcache_interval": 3, "deepcache_schedule": "uniform"}


def client_of(server: Server, key: str = "none") -> openai.OpenAI:
    host, port = server.address
    return openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def picture(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_pictures_come_with_the_caches_report(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="tiny-sd", prompt="a misty forest", n=2, size="256x192", extra_body={"seed": 258, "steps": 6, **CACHED}
    )
    assert answer.data is not None
    assert [picture(one.b64_json).getpixel((0, 0)) for one in answer.data] == [(2, 1, 14), (3, 1, 14)]
    assert (answer.size, answer.output_format) == ("256x192", "png")
    said = answer.model_extra or {}
    assert said["seeds"] == [258, 259]
    assert (said["cache"]["decisions"], said["cache"]["hit_rate"]) == ("CRRCRR CRRCRR", 0.6667)


def test_auto_is_the_models_own_size_and_its_defaults_are_taken(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="tiny-flux",
        prompt="a",
        size="auto",
        quality="auto",
        style="vivid",
        background="opaque",
        moderation="auto",
        user="somebody",
        response_format="b64_json",
        output_format="webp",
        output_compression=100,
    )
    assert answer.data is not None
    file = picture(answer.data[0].b64_json)
    assert (file.format, file.size, answer.size) == ("WEBP", (192, 128), "192x128")
    assert (answer.model_extra or {})["cache"]["strategy"] == "first_block"


def test_what_changes_no_picture_is_taken_and_a_url_holds_the_picture(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="tiny-sd", prompt="a", quality="hd", style="natural", response_format="url", size="auto"
    )
    assert answer.data is not None
    url = answer.data[0].url
    assert url is not None
    head, _, text = url.partition(",")
    assert (head, picture(text).format) == ("data:image/png;base64", "PNG")
    assert [warning.partition(" ")[0] for warning in (answer.model_extra or {})["warnings"][:2]] == ["quality", "style"]


def test_an_edit_draws_within_its_mask(client: openai.OpenAI) -> None:
    """A file, a path or bytes with a name, one of them in a list; other fields go by extra_body as anywhere."""
    picture_file, mask = io.BytesIO(), Image.new("RGBA", (96, 64), "black")
    Image.new("RGB", (96, 64), "green").save(picture_file, "PNG")
    mask.paste((0, 0, 0, 0), (0, 0, 48, 64))
    mask_file = io.BytesIO()
    mask.save(mask_file, "PNG")
    green, masked = ("green.png", picture_file.getvalue()), ("mask.png", mask_file.getvalue())
    answer = client.images.edit(
        model="tiny-sd", image=green, mask=masked, prompt="a", n=2, size="256x192", extra_body={"seed": 7, "steps": 4}
    )
    assert answer.data is not None
    assert [picture(one.b64_json).size for one in answer.data] == [(256, 192)] * 2
    assert (answer.model_extra or {})["seeds"] == [7, 8]
    events: list[Any] = list(client.images.edit(model="tiny-sd", image=[green], prompt="a", stream=True))
    assert [event.type for event in events] == ["image_edit.completed"]
    assert events[0].size == "192x128"
    with pytest.raises(openai.UnprocessableEntityError, match="no transparency"):
        client.images.edit(model="tiny-sd", image=green, mask=green, prompt="a", size="256x192")
    with pytest.raises(openai.UnprocessableEntityError, match="more than once"):
        client.images.edit(model="tiny-sd", image=[green, green], prompt="a")


@pytest.mark.parametrize(("asked", "expected"), [(0, 0), (1, 1), (3, 3)])
def test_a_stream_has_partial_pictures_and_each_whole_one(client: openai.OpenAI, asked: int, expected: int) -> None:
    stream = client.images.generate(
        model="tiny-sd",
        prompt="a",
        n=2,
        size="256x192",
        stream=True,
        partial_images=asked,
        extra_body={"steps": 8, **CACHED},
    )
    events: list[Any] = list(stream)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    whole = [event for event in events if event.type == "image_generation.completed"]
    assert [event.partial_image_index for event in partial] == list(range(expected))
    assert [picture(event.b64_json).format for event in partial] == ["PNG"] * expected
    assert [picture(event.b64_json).size for event in whole] == [(256, 192)] * 2
    assert events == partial + whole
    assert {(event.size, event.output_format, event.background) for event in events} == {("256x192", "png", "opaque")}
    assert whole[0].usage.total_tokens == 0
    assert whole[1].cache["hit_rate"] > 0.6


def test_a_stream_s_failure_is_the_client_s_exception(client: openai.OpenAI) -> None:
    with client.images.generate(model="hungry", prompt="a", stream=True) as stream, pytest.raises(openai.APIError) as e:
        list(stream)
    assert "memory" in e.value.message
    assert (e.value.type, e.value.param) == ("out_of_memory", None)


def test_a_stream_that_is_left_frees_the_worker(server: Server, client: openai.OpenAI) -> None:
    def cancelled() -> float:
        found = re.search(r'^wavespeed_requests_total{model="slow",outcome="cancelled"} (.+)$', metrics(), re.MULTILINE)
        return 0.0 if found is None else float(found[1])

    def metrics() -> str:
        return server.get("/metrics").text

    before = cancelled()
    stream = client.images.generate(model="slow", prompt="a", n=10, stream=True, extra_body={"steps": 150})
    wait_for(lambda: server.get("/api/telemetry").json()["running_count"] == 1, 60, "a running job")
    stream.close()
    wait_for(server.idle, 60, "an idle server")
    wait_for(lambda: cancelled() == before + 1, 60, "its count")


def test_models_are_listed(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[:2] == ["tiny-sd", "tiny-flux"]
    one = client.models.retrieve("tiny-flux")
    assert (one.id, one.object, one.owned_by) == ("tiny-flux", "model", "wavespeed")
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    ("values", "kind", "field"),
    [
        ({"size": "513x512"}, openai.UnprocessableEntityError, "width"),
        ({"size": "large"}, openai.UnprocessableEntityError, "size"),
        ({"n": 11}, openai.UnprocessableEntityError, "n"),
        ({"background": "transparent"}, openai.UnprocessableEntityError, "background"),
        ({"extra_body": {"deepcache_intervall": 3}}, openai.UnprocessableEntityError, "deepcache_intervall"),
        ({"extra_body": {"fbcache_enabled": True}}, openai.UnprocessableEntityError, "fbcache_enabled"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model"),
        ({"model": "hungry", "n": 1}, openai.InternalServerError, None),
    ],
)
def test_errors_are_the_client_s_own_with_our_words(
    client: openai.OpenAI, values: dict[str, Any], kind: type[openai.APIStatusError], field: str | None
) -> None:
    with pytest.raises(kind) as caught:
        client.images.generate(**{"prompt": "a", "model": "tiny-sd", **values})
    error = caught.value
    assert isinstance(error.body, dict)
    assert error.body["field"] == field
    assert error.type == error.body["type"]
    assert error.body["message"] in error.message
    assert error.request_id == error.body["request_id"]


def test_a_key_is_asked_for_and_a_full_queue_says_when_to_come_back(locked: Server) -> None:
    with client_of(locked, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.images.generate(model="tiny-sd", prompt="a")

    host, port = locked.address
    api = httpx.Client(base_url=f"http://{host}:{port}/api", headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    with client_of(locked, KEY) as client, api:
        busy = api.post("/jobs", json={"prompt": "a", "model": "slow", "steps": 150, "num_images": 10}).json()["id"]
        wait_for(lambda: api.get("/telemetry").json()["running_count"] == 1, 60, "a running job")
        waiting = api.post("/jobs", json={"prompt": "a"}).json()["id"]
        with pytest.raises(openai.RateLimitError) as refused:
            client.images.generate(model="tiny-sd", prompt="a")
        assert int(refused.value.response.headers["retry-after"]) > 0
        for job in (waiting, busy):
            api.delete(f"/jobs/{job}")
        wait_for(lambda: api.get("/telemetry").json()["running_count"] == 0, 60, "an idle server")
        assert client.images.generate(model="tiny-sd", prompt="a").data
