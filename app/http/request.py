"""A request's body as a JSON object: bounded in size and time, strict in form."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request

from app.engine.types import Catalogue, Engine
from app.errors import BodyTimeout, BodyTooLarge, Cancelled, Invalid, NotReady
from app.http.desk import Desk
from app.http.schemas import shown
from app.jobs.jobs import JobBoard
from app.metrics import Metrics
from app.settings import Settings

_PARSED_INLINE = 64 * 2**10  # a longer body is parsed in a thread, beside the event loop


async def read_object(request: Request, settings: Settings) -> dict[str, Any]:
    """Raises Invalid, BodyTooLarge, BodyTimeout; Cancelled when the client leaves before the end."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Invalid(f"The body must be JSON: send Content-Type: application/json, not {shown(kind) or 'none'}.")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Invalid("A compressed body is not read; send it without Content-Encoding.")
    body = await _read(request, settings)
    if not body.strip():
        raise Invalid("The body is empty; send a JSON object with at least a prompt.")
    if len(body) > _PARSED_INLINE:
        return await asyncio.to_thread(_parse, body)
    return _parse(body)


async def _read(request: Request, settings: Settings) -> bytes:
    limit = settings.max_body_bytes
    too_large = BodyTooLarge(f"The body is longer than {limit} bytes, the most that this server reads.")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise BodyTimeout(f"The body did not arrive within {settings.body_seconds:g} seconds.") from None
    except ClientDisconnect:
        raise Cancelled("The client left while sending.") from None
    return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        # NaN and Infinity are read here and refused by the schema, which can name their field.
        value = json.loads(body, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise Invalid("The body is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise Invalid(f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except ValueError:  # not UTF-8, or an integer of thousands of digits
        raise Invalid("The body is not JSON: bytes that are not UTF-8, or a number too long to read.") from None
    if not isinstance(value, dict):
        raise Invalid("The body must be one JSON object, with braces around it.")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Invalid(f"{shown(name)!r} is given more than once; give it once.", field=shown(name))
            seen.add(name)
    return result


@dataclass(frozen=True, slots=True)
class Service:
    settings: Settings
    engine: Engine
    metrics: Metrics
    jobs: JobBoard
    desk: Desk = field(default_factory=Desk)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def request_id_of(request: Request) -> str:
    """Made by the outermost middleware for each request; the job has the same id."""
    return str(request.state.request_id)


def catalogue_or_none(engine: Engine) -> Catalogue | None:
    try:
        return engine.catalogue()
    except NotReady:
        return None
