"""The service as the page sees it: the HTTP API, and nothing else of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 30.0
SILENCE_SECONDS = 60.0  # of an event stream, which says at least every 15 s that it is alive


class ServerError(Exception):
    """No answer, or not the one that was wanted. The text is for the user: what is wrong and what to do."""


class Away(ServerError):
    """Nobody answers at the server's address, or the connection broke."""


class Refused(ServerError):
    """The server's own sentence. `field` is the request's field at fault, if it is one's."""

    def __init__(self, message: str, *, status: int, type: str = "", field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.field = field


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event of a job: queued, running, progress, preview, done or error."""

    number: int
    name: str
    data: Mapping[str, Any]


class Server:
    """May be used from several threads. Every method raises Away or Refused."""

    def __init__(self, address: str, api_key: str = "", *, transport: httpx.BaseTransport | None = None) -> None:
        self.address = address
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        self._client = httpx.Client(base_url=address, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def models(self) -> dict[str, Any]:
        """GET /api/models: `default` and `models`, a row each with its cache, branches and samplers."""
        return self._ask("GET", "/api/models")

    def telemetry(self) -> dict[str, Any]:
        return self._ask("GET", "/api/telemetry")

    def submit(self, body: Mapping[str, Any]) -> str:
        """The id of the new job."""
        return str(self._ask("POST", "/api/jobs", json=body)["id"])

    def result(self, job: str) -> dict[str, Any]:
        """Of a job that is done: what POST /api/generate would have answered."""
        answer = self._ask("GET", f"/api/jobs/{job}")["result"]
        if not isinstance(answer, dict):
            raise Away("The server said that the picture is done and has none. Generate it again.")
        return answer

    def cancel(self, job: str) -> None:
        self._ask("DELETE", f"/api/jobs/{job}")

    def events(self, job: str, after: int = 0) -> Iterator[Event]:
        """What happens to a job, from the event that follows number `after`, until its `done` or `error`."""
        headers = {"Last-Event-ID": str(after)} if after else {}
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, read=SILENCE_SECONDS)
        try:
            with self._client.stream("GET", f"/api/jobs/{job}/events", headers=headers, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                yield from parsed(response.iter_lines())
        except httpx.TransportError as error:
            raise self._away(error) from None

    def _ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise self._away(error) from None
        if response.is_error:
            raise _refusal(response)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Away(f"What answers at {self.address} is no WaveSpeed server. Set WAVESPEED_UI_SERVER.")
        return answer

    def _away(self, error: httpx.TransportError) -> Away:
        if isinstance(error, httpx.ReadTimeout):
            return Away(f"The server at {self.address} takes too long to answer. It may be overloaded; try again.")
        return Away(
            f"The server at {self.address} does not answer. Start it with scripts/run, or start the page with "
            "WAVESPEED_UI_SERVER set to where it runs."
        )


def parsed(lines: Iterable[str]) -> Iterator[Event]:
    """The events of a stream of server-sent events whose data are JSON; comments, which keep it alive, are dropped."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            if name:
                fields[name] = value.removeprefix(" ")
        elif fields:
            if "data" in fields:
                yield Event(int(fields.get("id", "0")), fields.get("event", ""), json.loads(fields["data"]))
            fields = {}


def _refusal(response: httpx.Response) -> Refused:
    try:
        error = response.json()["error"]
        message, type, field = str(error["message"]), str(error["type"]), error.get("field")
    except (ValueError, KeyError, TypeError):
        message, type, field = f"The server answered {response.status_code} {response.reason_phrase}.", "", None
    seconds = response.headers.get("Retry-After", "")
    if seconds.isdigit():
        message += f" Try again in {seconds} s."
    return Refused(message, status=response.status_code, type=type, field=field)
