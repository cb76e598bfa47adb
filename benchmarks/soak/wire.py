"""HTTP spoken by hand: what no client library would send, and an answer read whatever became of the sending."""

from __future__ import annotations

import http.client
import json
import select
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

Part = bytes | float
"""Bytes to send, or seconds to wait before the next ones."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def type(self) -> str | None:
        """That of an error in the service's shape; None for anything else."""
        try:
            error = json.loads(self.body)["error"]
            return str(error["type"]) if set(error) == {"type", "message", "field", "request_id"} else None
        except (ValueError, TypeError, KeyError):
            return None


def exchange(
    address: tuple[str, int], parts: Iterable[Part], *, seconds: float = 60.0, leave: bool = False
) -> Answer | None:
    """Send `parts` until an answer comes; return it. None: the server closed without one, or we left before it.

    Raises TimeoutError when neither happens within `seconds`.
    """
    with socket.create_connection(address, timeout=seconds) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                if isinstance(part, bytes):
                    connection.sendall(part)
                if select.select([connection], [], [], part if isinstance(part, float) else 0)[0]:
                    break  # answered or closed before the end, as a server may
        if leave:
            return None
        response = http.client.HTTPResponse(connection)
        try:
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())
        except (ConnectionResetError, http.client.BadStatusLine, http.client.IncompleteRead):
            return None
        finally:
            response.close()


def request(
    body: bytes | str, *, method: str = "POST", path: str = "/api/generate", length: object = None, **headers: str
) -> bytes:
    """A whole request; `length` replaces the true Content-Length. Header names are given with underscores."""
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    named = {"host": "localhost", "content_type": "application/json", "connection": "close"} | headers
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in named.items())]
    if "transfer_encoding" not in headers:
        lines.append(f"content-length: {len(data) if length is None else length}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


def chunked(data: bytes, size: int = 4096, **headers: str) -> list[bytes]:
    """The same with a chunked body, part by part."""
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    sent = [f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces]
    return [request("", transfer_encoding="chunked", **headers), *sent, b"0\r\n\r\n"]
