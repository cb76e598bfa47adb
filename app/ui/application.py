"""The page as an ASGI application: a process of its own behind a Unix socket, to which the service's port hands on.

Why a process: Streamlit runs a session's script in a thread, and ten busy pages would take the interpreter from whoever
asks the API (docs/decisions/page-process.md).
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_log = logging.getLogger(__name__)

VISITOR = "x-wavespeed-visitor"
"""Header by which the page is told the address of whoever looks at it, and tells the service for whom it asks."""
KEY_COOKIE = "wavespeed_key"
"""The visitor's key, in URL-safe base64."""
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds until a page process that ended is started again
_SILENCE = 60.0  # seconds without a byte from the page's process
_OF_A_CONNECTION = (b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", VISITOR.encode())
_OF_A_SOCKET = ("sec-websocket-", "host", "content-length")
_STARTING = b"""<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="1">
<title>WaveSpeed</title><style>:root { font-family: system-ui; color-scheme: light dark }</style>
<p>The page is starting.</p>"""


class Page:
    """`address`: of the service that it asks. `token`: by which the service knows its requests.

    `largest_upload`: bytes of a dropped picture.
    """

    def __init__(self, largest_upload: int) -> None:
        self.address = ""
        self.token = secrets.token_urlsafe()
        self._largest_upload = largest_upload
        self._socket = ""
        self._client: httpx2.AsyncClient | None = None

    def lifespan(self) -> Callable[[Any], AbstractAsyncContextManager[None]]:
        return self._running

    @asynccontextmanager
    async def _running(self, _: Any) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="wavespeed-page-") as folder:  # which its user alone may enter
            self._socket = str(Path(folder) / "socket")
            transport = httpx2.AsyncHTTPTransport(uds=self._socket)
            timeout = httpx2.Timeout(_SILENCE)
            async with httpx2.AsyncClient(base_url="http://page", transport=transport, timeout=timeout) as self._client:
                kept = asyncio.create_task(self._keep())
                try:
                    yield
                finally:
                    kept.cancel()
                    with suppress(asyncio.CancelledError):
                        await kept

    async def _keep(self) -> None:
        """A process, and another one when it has ended."""
        pause = _PAUSE
        while True:
            try:
                ended = f"ended with code {await self._process()}"
            except OSError as error:
                ended = f"cannot be started: {error}"
            _log.warning("the page's process %s; it is tried again in %g seconds", ended, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _process(self) -> int:
        """One process, to its end; its exit code."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app.ui", stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        settings = {
            "socket": self._socket,
            "address": self.address,
            "token": self.token,
            "largest_upload": self._largest_upload,
        }
        try:
            if process.stdin is not None:  # it stays open: at its end the process knows that it is alone
                process.stdin.write(json.dumps(settings).encode() + b"\n")
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._talk(scope, receive, send)
        else:
            await self._hand_on(scope, receive, send)

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._client is None:
            raise RuntimeError("the page is asked for before its lifespan")

        async def body() -> AsyncIterator[bytes]:
            more = True
            while more:
                message = await receive()
                yield message.get("body", b"")
                more = message["type"] == "http.request" and message.get("more_body", False)

        url = httpx2.URL(path=scope["path"], query=scope["query_string"])
        has_body = scope["method"] not in ("GET", "HEAD")
        request = self._client.build_request(
            scope["method"], url, headers=_headers(scope), content=body() if has_body else None
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx2.TransportError:
            headers = [(b"content-type", b"text/html; charset=utf-8"), (b"retry-after", b"1")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": _STARTING})
            return
        try:
            headers = [(name.lower(), value) for name, value in response.headers.raw]
            headers = [(name, value) for name, value in headers if name not in _OF_A_CONNECTION]
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()

    async def _talk(self, scope: Scope, receive: Receive, send: Send) -> None:
        from websockets.asyncio.client import unix_connect
        from websockets.exceptions import ConnectionClosed, WebSocketException

        await receive()  # websocket.connect
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in _headers(scope)]
        headers = [(name, value) for name, value in headers if not name.startswith(_OF_A_SOCKET)]
        try:
            page = await unix_connect(
                self._socket,
                uri=f"ws://page{scope['path']}",
                subprotocols=scope.get("subprotocols") or None,
                additional_headers=headers,
                user_agent_header=None,
                compression=None,
                max_size=None,
                ping_interval=None,
            )
        except (OSError, WebSocketException, TimeoutError):
            await send({"type": "websocket.close", "code": 1013})
            return
        await send({"type": "websocket.accept", "subprotocol": page.subprotocol})

        async def from_browser() -> None:
            while (message := await receive())["type"] == "websocket.receive":
                data = message.get("bytes")
                await page.send(message["text"] if data is None else data)

        async def from_page() -> None:
            with suppress(ConnectionClosed):  # also when the process died
                async for data in page:
                    await send({"type": "websocket.send", "text" if isinstance(data, str) else "bytes": data})
            await send({"type": "websocket.close", "code": 1012})  # it starts again: a browser comes back

        both = [asyncio.create_task(from_browser()), asyncio.create_task(from_page())]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                with suppress(ConnectionClosed):
                    task.result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            await page.close()


def _headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The request's, without those of its connection; and whose it is."""
    given: Iterable[tuple[bytes, bytes]] = scope["headers"]
    visitor = (scope.get("client") or [""])[0]
    kept = [(name, value) for name, value in given if name not in _OF_A_CONNECTION]
    return [*kept, (VISITOR.encode(), str(visitor).encode())]
