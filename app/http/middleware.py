"""Around every request: its id, whose it is and whether it may ask, the headers of every answer, the last catch."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import tracing
from app.errors import ForeignOrigin, MisdirectedRequest, ServiceError, Unauthorized, shown
from app.jobs.jobs import KEY_OWNER
from app.log import request_id

_log = logging.getLogger(__name__)

# An answer is no page: a browser that is led to it runs nothing in it, frames it nowhere, guesses no type for it and
# keeps no copy. /docs sets its own policy.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# The page loads and asks nothing of another host. Streamlit brings components as blobs and compiles charts.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' blob: 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; base-uri 'self'; form-action 'self'; object-src 'none'; "
    "frame-ancestors 'none'"
)
PAGE_SOCKET = "/_stcore/stream"
PAGE_ADDRESSES = ("/", "/favicon.png", "/manifest.json", "/_stcore/health", "/_stcore/host-config", PAGE_SOCKET)
PAGE_FOLDERS = ("/static/", "/media/", "/_stcore/upload_file/", "/_stcore/bidi-components/")
"""What the page takes of Streamlit's addresses; its others are not served."""
KEY_COOKIE = "wavespeed_key"
VISITOR = "X-WaveSpeed-Visitor"
"""A header of the page's requests: its token, a space, and the address of whoever looks at it."""


class RequestContext:
    """Gives each request an id (log, `X-Request-Id`, error bodies), asks the guard whose it is, turns a bug into a 500.

    HEAD is answered as GET is, without the body (RFC 9110, section 9.3.2).
    """

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            try:
                self._guard.owner(scope)
            except ServiceError as error:
                _log.info("refused a websocket type=%s: %s", error.type, error.message)
                await send({"type": "websocket.close", "code": 1008})  # before it was accepted, so: HTTP 403
                return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = identity
        tracing.identified(identity)
        token = request_id.set(identity)
        started = False
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
            receive, send = _headers_alone(receive, send)

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = identity
                if self._guard.is_page(scope["path"]):
                    headers.setdefault("Content-Security-Policy", _PAGE_POLICY)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            state["owner"] = self._guard.owner(scope)
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


def _headers_alone(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """The same connection for an answer whose body is dropped; a stream ends with its headers."""
    ended = asyncio.Event()

    async def receive_until_ended() -> Message:
        if ended.is_set():
            return {"type": "http.disconnect"}
        return await receive()

    async def send_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            ended.set()

    return receive_until_ended, send_headers


def error_response(error: ServiceError, identity: str) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == Unauthorized.status:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(identity), status_code=error.status, headers=headers)


_LOOKS = ("GET", "HEAD", "OPTIONS")
_OPEN = ("/", "/livez", "/readyz", "/health", "/docs", "/openapi.json")
_OPEN_FOLDER = "/docs/"
_BASIC_FOLDER = "/sdapi/"  # AUTOMATIC1111's clients know no other way than user name and password


class Guard:
    """Who may ask, and whose a request is.

    Every address asks for a key, new ones too, but health, the documentation and, if `metrics_open`, /metrics. Without
    keys whoever reaches the port may ask. Somebody's browser reaches it for a foreign page by a name that is pointed
    here (DNS rebinding): it is stopped by the name, which must be an address, one word, or among `hosts`. A page of
    another web site can send what a form can send, without asking first, and open a websocket: it is stopped by the
    origin that its browser names, unless that is among `origins`.

    `page`: the token of the page that this server has, by which the page may say for whom it asks. What the page itself
    is made of is asked for by browsers, which send a key as a cookie: that opens no other address.
    """

    def __init__(
        self,
        keys: Sequence[str],
        hosts: Sequence[str],
        origins: Sequence[str] = (),
        *,
        metrics_open: bool,
        page: str | None = None,
    ) -> None:
        self._keys = [_digest(key.encode()) for key in keys]
        self._hosts = {host.lower() for host in hosts}
        self._origins = {origin.lower() for origin in origins}
        self._open = {*_OPEN, "/metrics"} if metrics_open else set(_OPEN)
        self._page = page

    def is_page(self, path: str) -> bool:
        return self._page is not None and (path in PAGE_ADDRESSES or path.startswith(PAGE_FOLDERS))

    def owner(self, scope: Scope) -> str:
        """The key that matched, by a name that does not tell it; without keys the peer's address.

        Raises Unauthorized, MisdirectedRequest, ForeignOrigin.
        """
        headers = Headers(scope=scope)
        if not self._keys and not self._is_ours(headers.get("host", "")):
            raise MisdirectedRequest(
                f"This server does not go by the name {shown(headers['host'])!r}. Address it by its IP address or as "
                "localhost; its operator can list further names in WAVESPEED_ALLOWED_HOSTS."
            )
        if scope["type"] == "websocket" or scope["method"] not in _LOOKS:
            self._check_origin(headers)
        path = scope["path"]
        if not self._keys or path in self._open or path.startswith(_OPEN_FOLDER):
            return f"peer:{self._visitor(headers) or (scope.get('client') or [''])[0]}"
        if self.is_page(path):
            return self.owner_of_key(cookie_key(headers))
        return self._key(headers.get("authorization", ""), basic=path.startswith(_BASIC_FOLDER))

    def admits(self, scope: Scope) -> bool:
        """Whether a browser is to be shown the page, or has to give a key first."""
        try:
            return not self._keys or bool(self.owner_of_key(cookie_key(Headers(scope=scope))))
        except Unauthorized:
            return False

    def _visitor(self, headers: Headers) -> str:
        """For whom the page asks; empty for a request that is not the page's."""
        token, _, address = headers.get(VISITOR, "").partition(" ")
        page = self._page is not None and hmac.compare_digest(_digest(token.encode()), _digest(self._page.encode()))
        return address if page else ""

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin", "").lower()
        ours = origin in self._origins or origin.partition("://")[2] == headers.get("host", "").lower()
        if ours if origin else headers.get("sec-fetch-site", "") != "cross-site":
            return
        raise ForeignOrigin(
            f"A page of {shown(origin) or 'another site'} may not ask for this. The server's operator can list its "
            "origin in WAVESPEED_CORS_ORIGINS."
        )

    def _key(self, header: str, *, basic: bool) -> str:
        scheme, _, key = header.partition(" ")
        key = key.strip()
        if basic and scheme.lower() == "basic":
            scheme, key = "bearer", _password(key)
        return self.owner_of_key(key if scheme.lower() == "bearer" else "")

    def owner_of_key(self, key: str) -> str:
        """Raises Unauthorized for what is none of the keys."""
        given = _digest(key.encode())
        # Digests are of one length, and all of them are compared: the time tells neither a key's length nor its place.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if not any(matches):
            raise Unauthorized("Send one of this server's keys as Authorization: Bearer <key>.")
        return KEY_OWNER + given.hex()[:16]

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


def key_cookie(key: str) -> str:
    """A key as a cookie's value, which some of a key's characters would end."""
    return base64.urlsafe_b64encode(key.encode()).decode()


def cookie_key(headers: Headers) -> str:
    """The key that a browser sends; empty, which is no key, if it sends none."""
    value = cookie_parser(headers.get("cookie", "")).get(KEY_COOKIE, "")
    try:
        return base64.urlsafe_b64decode(value).decode()
    except ValueError:
        return ""


def _password(credentials: str) -> str:
    """Of HTTP Basic (RFC 7617); empty, which is no key, if they are none."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
