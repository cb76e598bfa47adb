"""Around every request: its id, the API keys, and the last catch."""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ServiceError, Unauthorized
from app.log import request_id

_log = logging.getLogger(__name__)

_GUARDED = ("/api/", "/v1/")  # health and metrics carry nothing of a user's


class RequestContext:
    """Gives each request an id (log, `X-Request-Id`, error bodies), asks for a key, turns a bug into a plain 500."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str] = ()) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = identity
        token = request_id.set(identity)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = identity
            await send(message)

        try:
            if not self._allowed(scope):
                raise Unauthorized("Send one of this server's keys as Authorization: Bearer <key>.")
            await self._app(scope, receive, send_with_id)
        except ServiceError as error:
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

    def _allowed(self, scope: Scope) -> bool:
        if not self._keys or not scope["path"].startswith(_GUARDED):
            return True
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "replace")
        matches = [hmac.compare_digest(given, known) for known in self._keys]  # all of them: no early way out to time
        return scheme.lower() == "bearer" and any(matches)


def error_response(error: ServiceError, identity: str) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == Unauthorized.status:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(identity), status_code=error.status, headers=headers)
