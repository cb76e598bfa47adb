"""The same request in two tongues: this service's own API and OpenAI's images API, which its peers speak."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from benchmarks.serving.mix import Request


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answer says of itself. Seconds are None where the server does not tell.

    `status` is 0 when none came. `queue`: waited before the worker took it; `service`: from then to the result.
    """

    status: int
    images: int = 0
    queue: float | None = None
    service: float | None = None
    computed: int = 0
    reused: int = 0
    retry_after: bool = False
    error: str = ""


class Api(Protocol):
    path: str

    def body(self, request: Request) -> dict[str, Any]: ...

    def read(self, body: Mapping[str, Any]) -> Answer:
        """Of a 200. Raises KeyError, TypeError or ValueError when it does not hold what it must."""
        ...


@dataclass(frozen=True, slots=True)
class Native:
    """POST /api/generate. `extra` is added to every request."""

    extra: Mapping[str, Any] = field(default_factory=dict)
    path: str = "/api/generate"

    def body(self, request: Request) -> dict[str, Any]:
        return {**request.fields, **self.extra}

    def read(self, body: Mapping[str, Any]) -> Answer:
        pictures = body["images"] if "images" in body else [body["image"]]
        _check(pictures)
        timings, cache = body["timings"], body["cache"]
        queue = float(timings["queue_seconds"])
        return Answer(200, len(pictures), queue, timings["total_seconds"] - queue, cache["computed"], cache["reused"])


@dataclass(frozen=True, slots=True)
class OpenAI:
    """POST /v1/images/generations: prompt, n, size; pictures as base64.

    Fields that this API has no name for (steps, seed, caches) are left out; `extra` names them as the server does.
    """

    extra: Mapping[str, Any] = field(default_factory=dict)
    path: str = "/v1/images/generations"

    def body(self, request: Request) -> dict[str, Any]:
        fields = request.fields
        size = f"{fields.get('width', 512)}x{fields.get('height', 512)}"
        named = {"prompt": fields["prompt"], "n": request.images, "size": size, "response_format": "b64_json"}
        return {**named, **self.extra}

    def read(self, body: Mapping[str, Any]) -> Answer:
        pictures = [entry["b64_json"] for entry in body["data"]]
        _check(pictures)
        return Answer(200, len(pictures))


APIS: Mapping[str, type[Native] | type[OpenAI]] = {"native": Native, "openai": OpenAI}


def _check(pictures: list[str]) -> None:
    if not pictures or not all(isinstance(text, str) and text for text in pictures):
        raise ValueError("a 200 without its pictures")


async def ask(client: httpx.AsyncClient, api: Api, request: Request) -> Answer:
    """Send and read; whatever goes wrong on the way is an answer with status 0."""
    try:
        response = await client.post(api.path, json=api.body(request))
        if response.status_code != 200:
            waits = "retry-after" in response.headers
            return Answer(response.status_code, retry_after=waits, error=response.text[:300])
        return api.read(json.loads(response.content))
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        return Answer(0, error=f"{type(error).__name__}: {error}")
