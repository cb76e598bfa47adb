"""Around every request: its id, the guard, the headers of every answer, and the last catch."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import logging
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import tracing
from app.errors import MisdirectedRequest, ServiceError, Unauthorized
from app.http.schemas import shown
from app.log import request_id

_log = logging.getLogger(__name__)

# Nothing here is a page: a browser that is led to an answer runs nothing in it, frames it nowhere, guesses no type for
# it and keeps no copy. /docs sets its own policy.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class RequestContext:
    """Gives each request an id (log, `X-Request-Id`, error bodies), asks the guard, turns a bug into a plain 500."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = identity
        tracing.identified(identity)
        token = request_id.set(identity)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = identity
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._guard.check(scope)
            await self._app(scope, receive, send_with_id)
        except ServiceError as error:
            _log.info("refused status=%d type=%s: %s", error.status, error.type, error.message)
            await error_response(error, identity)(scope, receive, send_with_id)
        except Exception:  # a bug of ours: logged whole, told to the client without its insides
            _log.exception("internal error")
            if started:
                raise
            await error_response(ServiceError("The server made a mistake; its log has it."), identity)(
                scope, receive, send_with_id
            )
        finally:
            request_id.reset(token)


def error_response(error: ServiceError, identity: str) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == Unauthorized.status:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(identity), status_code=error.status, headers=headers)


_OPEN = ("/", "/livez", "/readyz", "/health", "/docs", "/openapi.json")
_OPEN_FOLDER = "/docs/"
_BASIC_FOLDER = "/sdapi/"  # AUTOMATIC1111's clients know no other way than user name and password


class Guard:
    """Every address asks for a key, new ones too, but health, the documentation and, if `metrics_open`, /metrics.

    Without keys whoever reaches the port may ask. A page in somebody's browser reaches it by a name of its own that it
    points here (DNS rebinding): it is stopped by the name, which must be an address, one word, or among `hosts`.
    """

    def __init__(self, keys: Sequence[str], hosts: Sequence[str], *, metrics_open: bool) -> None:
        self._keys = [_digest(key.encode()) for key in keys]
        self._hosts = {host.lower() for host in hosts}
        self._open = {*_OPEN, "/metrics"} if metrics_open else set(_OPEN)

    def check(self, scope: Scope) -> None:
        """Raises Unauthorized, MisdirectedRequest."""
        headers = Headers(scope=scope)
        if not self._keys and not self._is_ours(headers.get("host", "")):
            raise MisdirectedRequest(
                f"This server does not go by the name {shown(headers['host'])!r}. Address it by its IP address or as "
                "localhost; its operator can list further names in WAVESPEED_ALLOWED_HOSTS."
            )
        path = scope["path"]
        if self._keys and path not in self._open and not path.startswith(_OPEN_FOLDER):
            self._check_key(headers.get("authorization", ""), basic=path.startswith(_BASIC_FOLDER))

    def _check_key(self, header: str, *, basic: bool) -> None:
        scheme, _, key = header.partition(" ")
        key = key.strip()
        if basic and scheme.lower() == "basic":
            scheme, key = "bearer", _password(key)
        given = _digest(key.encode())
        # Digests are of one length, and all of them are compared: the time tells neither a key's length nor its place.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("Send one of this server's keys as Authorization: Bearer <key>.")

    def _is_ours(self, host: str) -> bool:
        name = host.lower()
        if ":" in name and not name.endswith("]"):
            name = name.rpartition(":")[0]  # the port
        name = name.strip("[]")
        if name in self._hosts or "." not in name.removesuffix(".localhost"):
            return True  # of a name without a dot, and of an address, no stranger owns the resolution
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _password(credentials: str) -> str:
    """Of HTTP Basic (RFC 7617); empty, which is no key, if they are none."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
