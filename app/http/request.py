"""What a request brings: whose it is, and its body, a JSON object or a form, bounded in size, time and memory."""

from __future__ import annotations

import asyncio
import json
from binascii import b2a_base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from app.engine.types import Engine
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    Cancelled,
    Incompatible,
    Invalid,
    JobNotFound,
    Unsupported,
    shown,
)
from app.http.foreign import LIGHTDIFFUSION, translated
from app.http.pictures import MOST_PIXELS
from app.http.resolve import SEEDS, Resolver
from app.http.schemas import GenerateRequest
from app.images import read_texts
from app.jobs.jobs import Jobs
from app.jobs.record import LEFT_OUT, Drawn, JobRecord
from app.metrics import Metrics
from app.settings import Settings

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

SMALL = 64 * 2**10
"""Bytes. A longer body waits for its turn, and is parsed in a thread, beside the event loop."""
MOST_PARTS = 256  # of a form
LONGEST_BOUNDARY = 70  # RFC 2046, section 5.1.1
LARGEST_AT_ONCE = 4  # bodies of the longest size that are held at once
OF_ONE_ANSWER = {"enable_preview", "deadline_seconds"}
BESIDE_RERENDER = {"seed", "hires_fix", "hires_upscaler", "adetailer", "upscale", "output_format"}
CACHES = ("deepcache_", "fbcache_", "cache_")  # how the fields of caches begin
RENAMED = {name: field for name, field in LIGHTDIFFUSION.items() if field.ours}


class Uploads:
    """Room for so many bytes of large bodies; who comes when it is taken waits, so that no number of them adds up."""

    def __init__(self, room: int) -> None:
        self._free = room
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taking(self, size: int) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            async with self._changed:
                self._free += size
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Service:
    """What every endpoint works with."""

    settings: Settings
    engine: Engine
    metrics: Metrics
    jobs: Jobs
    resolver: Resolver
    uploads: Uploads
    chosen: dict[str, str] = field(default_factory=dict)
    """Owner → the model of its requests under /sdapi that name none."""


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def request_id_of(request: Request) -> str:
    """Made by the outermost middleware for each request; the job has the same id."""
    return str(request.state.request_id)


def owner_of(request: Request) -> str:
    """The API key that matched, by a name that does not tell it; without keys the peer's address."""
    return str(request.state.owner)


@asynccontextmanager
async def asked(request: Request, *, form: bool = False) -> AsyncIterator[dict[str, Any]]:
    """The body of a request for pictures, by `read_object` or `read_form`.

    A failure in the block, which makes a job of it, is counted and logged. A large body has its share of the memory for
    uploads until the end of the block: let go of it there.
    """
    with service_of(request).jobs.refusals():
        async with _held(request, read_form if form else read_object) as body:
            yield body


@asynccontextmanager
async def _held(
    request: Request, read: Callable[[Request], Awaitable[dict[str, Any]]]
) -> AsyncIterator[dict[str, Any]]:
    service = service_of(request)
    length = _length(request)
    size = service.settings.max_body_bytes if length is None else length
    if size <= SMALL or size > service.settings.max_body_bytes:  # the latter is refused before it is read
        yield await read(request)
        return
    async with service.uploads.taking(size):
        yield await read(request)


async def texts_of(request: Request) -> dict[str, str]:
    """The text chunks of the PNG in the body's `image`. Raises as `read_object` and `read_texts` do."""
    async with _held(request, read_object) as body:
        if body.keys() != {"image"} or not isinstance(body["image"], str):
            raise Invalid('The body must be {"image": "…"}, a picture as base64 or a data URL.', field="image")
        return await asyncio.to_thread(read_texts, body["image"], field="image", max_pixels=MOST_PIXELS)


def interrupted(request: Request, api: str) -> None:
    """Give up the caller's oldest job under way that came by this API, if there is one."""
    jobs = service_of(request).jobs
    for record in jobs.of(owner_of(request), api)[:1]:
        jobs.leave(record)


def repeated(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """The body by our names; with `rerender` that of the job which it names, uncached, what stands beside it put in.

    Raises JobNotFound, Incompatible for a field that the job has said, Unsupported where the job's body is not kept.
    """
    given, _ = translated(body, RENAMED)
    if (identity := given.pop("rerender", None)) is None:
        return given
    if not isinstance(identity, str):
        raise Invalid("rerender is the id of a job, a string.", field="rerender")
    for name in given:
        if name in GenerateRequest.model_fields and name not in BESIDE_RERENDER | OF_ONE_ANSWER:
            raise Incompatible(
                f"{name} is the job's to say: leave it out beside rerender, or leave rerender out and give all fields.",
                field=name,
            )
    try:
        first = service_of(request).jobs.get(identity, owner_of(request)).request
    except JobNotFound as error:
        message = f"{error.message} Those of POST /api/jobs alone are kept."
        raise JobNotFound(message, field="rerender") from None
    if first is None or LEFT_OUT in first:
        raise Unsupported(
            "The fields of that job are not kept: they held a picture, or the server was restarted before its end. "
            "Send them again.",
            field="rerender",
        )
    gone = OF_ONE_ANSWER | {name for name in first if name.startswith(CACHES)}
    whole = {name: value for name, value in first.items() if name not in gone} | {"fbcache_enabled": False}
    if "seed" in given:
        start = first.get("seed") or 0  # none: of a job that an older version promised, and that was not begun yet
        seeds = [(start + index) % SEEDS for index in range(first.get("num_images", 1))]
        if given["seed"] not in seeds:
            raise Incompatible(
                f"Beside rerender seed picks one of that job's pictures: {', '.join(map(str, seeds))}.", field="seed"
            )
        whole["num_images"] = 1
    return whole | given


async def read_object(request: Request) -> dict[str, Any]:
    """Raises Invalid, BodyTooLarge, BodyTimeout; Cancelled when the client leaves before the end."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Invalid(f"The body must be JSON: send Content-Type: application/json, not {shown(kind) or 'none'}.")
    body = await body_of(request)
    if not body.strip():
        raise Invalid("The body is empty; send a JSON object with at least a prompt.")
    if len(body) > SMALL:
        return await asyncio.to_thread(_parse, body)
    return _parse(body)


@dataclass(frozen=True, slots=True)
class FormFile:
    """A file that came in a form."""

    base64: str


async def read_form(request: Request) -> dict[str, str | FormFile]:
    """The parts of a multipart/form-data body (RFC 7578) by name: text, and those with a filename.

    It is read whole into memory, within the bounds of any body, and no part lies on a disk. Raises as `read_object`.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        sent = shown(kind.decode("latin-1")) or "none"
        raise Invalid(f"The body must be a form: send Content-Type: multipart/form-data, not {sent}.")
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= LONGEST_BOUNDARY:
        raise Invalid(f"multipart/form-data needs a boundary of 1 to {LONGEST_BOUNDARY} characters in Content-Type.")
    body = await body_of(request)
    if len(body) > SMALL:
        return await asyncio.to_thread(_parts, body, boundary)
    return _parts(body, boundary)


async def waited(request: Request, record: JobRecord) -> Drawn:
    """The pictures of an ephemeral job, unless the client leaves first; then the job is cancelled.

    Raises what the job ended with. Not for an answer that has begun: the server listens for the client's leaving then.
    """
    gone = asyncio.create_task(_disconnected(request))
    either: set[asyncio.Future[Any]] = {record.outcome, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        service_of(request).jobs.leave(record)
    return await record.outcome


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _length(request: Request) -> int | None:
    """Bytes that the client announces; None for a body that comes in chunks."""
    length = request.headers.get("content-length", "")
    return int(length[:20]) if length.isascii() and length.isdigit() else None


async def body_of(request: Request) -> bytes:
    """Raises Invalid, BodyTooLarge, BodyTimeout; Cancelled when the client leaves before the end."""
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Invalid("A compressed body is not read; send it without Content-Encoding.")
    settings = service_of(request).settings
    limit = settings.max_body_bytes
    too_large = BodyTooLarge(f"The body is longer than {limit} bytes, the most that this server reads.")
    if (_length(request) or 0) > limit:
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


def _parts(body: bytes, boundary: bytes) -> dict[str, str | FormFile]:
    form = _Form()
    parser = MultipartParser(boundary, form.callbacks)
    try:
        parser.write(body)
    except FormParserError as error:
        raise Invalid(f"The body is no form with the boundary that Content-Type names: {error}.") from None
    if not form.ended:
        raise Invalid("The body ends in the middle of a part, or before its closing boundary; send the whole form.")
    return form.parts


class _Form:
    """What a MultipartParser that is given a whole body finds in it."""

    def __init__(self) -> None:
        self.parts: dict[str, str | FormFile] = {}
        self.ended = False
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._close,
        }

    def _begin(self) -> None:
        if len(self.parts) == MOST_PARTS:
            raise Invalid(f"The form has more than {MOST_PARTS} parts.")
        self._header = b""
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[memoryview] = []

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header = data[start:end].lower()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._headers[self._header] = data[start:end]

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(memoryview(data)[start:end])

    def _end(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if kind != b"form-data" or not options.get(b"name"):
            raise Invalid('Each part of the form needs a Content-Disposition: form-data; name="…".')
        try:
            name = options[b"name"].decode()
        except UnicodeDecodeError:
            raise Invalid("The name of a part is not UTF-8.") from None
        if name in self.parts:
            raise Invalid(f"{shown(name)!r} is given more than once; give it once.", field=shown(name))
        if self._headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"binary", b"8bit", b"7bit"):
            raise Invalid(f"{shown(name)} is encoded; send it without Content-Transfer-Encoding.", field=shown(name))
        # A whole body is one chunk, and so is each part of it: nothing is copied before it is encoded.
        data = self._chunks[0] if len(self._chunks) == 1 else memoryview(b"".join(self._chunks))
        if b"filename" in options:
            self.parts[name] = FormFile(b2a_base64(data, newline=False).decode("ascii"))
            return
        try:
            self.parts[name] = str(data, "utf-8")
        except UnicodeDecodeError:
            raise Invalid(f"{shown(name)} is not UTF-8; a file needs a filename.", field=shown(name)) from None

    def _close(self) -> None:
        self.ended = True
