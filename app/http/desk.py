"""Who waits for which pictures now, for APIs that ask "how far is mine?" without saying which."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import Request

from app.engine.types import JobHandle
from models.base import Step


@dataclass(slots=True)
class Waiting:
    """A job that its client waits for; `step` is the last one done, `preview` the last JPEG."""

    handle: JobHandle
    step: Step | None = None
    preview: bytes | None = None

    def stepped(self, step: Step) -> None:
        self.step = step
        self.preview = step.preview or self.preview


class Desk:
    """Belongs to one event loop. A client is a key, or without keys an address; none sees or stops another's job."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Waiting]] = {}

    def of(self, request: Request) -> list[Waiting]:
        """Oldest first."""
        return list(self._waiting.get(_client(request), ()))

    @contextmanager
    def waits(self, request: Request, waiting: Waiting) -> Iterator[None]:
        client = _client(request)
        row = self._waiting.setdefault(client, [])
        row.append(waiting)
        try:
            yield
        finally:
            row.remove(waiting)
            if not row:
                del self._waiting[client]


def _client(request: Request) -> str:
    host = request.client.host if request.client is not None else ""
    return hashlib.sha256(request.headers.get("authorization", host).encode()).hexdigest()
