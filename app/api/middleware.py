"""Around every request: its id, the guard, the headers of every answer, and the last catch."""

from __future__ import annotations

import logging
import uuid

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import tracing
from app.api.guard import Guard
from app.errors import ServiceError, Unauthorized
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
