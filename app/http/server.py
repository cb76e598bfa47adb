"""The HTTP server as a process: it listens until it is told to end, and answers what it has accepted before it does."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

import psutil
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine.types import Engine
from app.errors import CannotStart
from app.http.app import Page
from app.settings import Settings

_log = logging.getLogger(__name__)

_MMAP_THRESHOLD, _LARGE = -3, 256 * 2**10  # mallopt(3): blocks from so many bytes on are mapped, each by itself

_BACKLOG = 2048  # connections that wait to be accepted
_ANSWERING = 10  # seconds to write the last answers once every job is settled


class Server(uvicorn.Server):
    """Drains before it closes. uvicorn alone would stop listening at the signal, and drop what it waits for in the end.

    First SIGTERM or SIGINT: the engine takes no more jobs and finishes those it has, for at most `drain_seconds`;
    meanwhile the server listens on, so that /readyz says no and whoever polls a job gets its result. Then uvicorn's own
    shutdown. Second signal: what is not done is answered 503 now. Third: no answer is waited for.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would raise the signal again at the end, which kills the process before its log is written."""
        self._signals += 1
        if self._loop is None:  # not even started: nothing was accepted
            self.should_exit = True
            return
        match self._signals:
            case 1:
                asyncio.run_coroutine_threadsafe(self._leave(), self._loop)
            case 2:
                asyncio.run_coroutine_threadsafe(self._engine.drain(0), self._loop)  # which cuts the other one short
            case _:
                self.should_exit = self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for address in addresses(sockets or []):
            _log.info("listening: %s/ (its API: %s/docs)", address, address)

    async def _leave(self) -> None:
        status = self._engine.status()
        _log.info("told to end: %d jobs run, %d wait, %g seconds", status.running, status.pending, self._drain_seconds)
        try:
            await self._engine.drain(self._drain_seconds)
        finally:
            self.should_exit = True


def addresses(sockets: Sequence[socket.socket]) -> list[str]:
    """http://127.0.0.1:7861 and so on, as a browser on this machine or its network takes them."""
    found = []
    for listening in sockets:
        host, port = listening.getsockname()[:2]
        hosts = [host]
        if ipaddress.ip_address(host).is_unspecified:
            cards = (card for name in psutil.net_if_addrs().values() for card in name)
            hosts = [card.address for card in cards if card.family == listening.family and "%" not in card.address]
            hosts.sort(key=lambda one: not ipaddress.ip_address(one).is_loopback)
        found += [f"http://{f'[{one}]' if ':' in one else one}:{port}" for one in hosts]
    return found


def _listen(host: str, port: int) -> list[socket.socket]:
    """On every address that `host` stands for. Raises CannotStart."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CannotStart(f"WAVESPEED_HOST: {host!r} is no address ({error.strerror}).") from None
    sockets: list[socket.socket] = []
    try:
        for family, *_, place in dict.fromkeys(places):
            try:
                sockets.append(socket.create_server((place[0], port), family=family, backlog=_BACKLOG))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
            else:
                port = sockets[0].getsockname()[1]
    except OSError as error:
        for one in sockets:
            one.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"another program listens on port {port} of {host}; take another port, or 0 for one that is free"
        else:
            reason = f"port {port} of {host} cannot be listened on: {os.strerror(error.errno or 0)}"
        raise CannotStart(f"WAVESPEED_PORT: {reason}.") from None
    if not sockets:
        raise CannotStart(f"WAVESPEED_HOST: {host!r} is no address of this machine.")
    return sockets


def _briefly(app: ASGIApp, failed: Callable[[], None]) -> ASGIApp:
    """Tell of a start that could not be in the sentence of CannotStart; the framework tells it as a stack trace."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_briefly(message: Message) -> None:
            error = sys.exc_info()[1]  # the framework sends from where it has caught it
            if message["type"] == "lifespan.startup.failed" and isinstance(error, CannotStart):
                message = {**message, "message": str(error)}
                failed()
            await send(message)

        await app(scope, receive, send_briefly if scope["type"] == "lifespan" else send)

    return wrapped


def _give_back_large_blocks() -> None:
    """To the system, once they are free: glibc keeps what is often asked for, such as the pictures of clients."""
    with suppress(OSError, AttributeError):  # another system, or another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def serve_until_told(app: FastAPI, settings: Settings, engine: Engine, page: Page | None = None) -> None:
    """Serve `app`, whose engine is `engine` and whose page `page`.

    Raises SystemExit, with code 2 where a setting is at fault.
    """
    _give_back_large_blocks()
    told: list[int] = []
    config = uvicorn.Config(
        _briefly(app, lambda: told.append(2)),
        # Else uvicorn takes others where they are installed, with the extra `ray` one that bounds no header.
        http="h11",
        loop="asyncio",
        ws="none" if page is None else "websockets-sansio",
        ws_per_message_deflate=False,  # it would take the event loop's time
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.proxies),  # uvicorn alone believes whoever connects from loopback
        forwarded_allow_ips=list(settings.proxies),
        timeout_graceful_shutdown=_ANSWERING,
    )
    try:
        sockets = _listen(settings.host, settings.port)
        if page is not None:
            page.address = addresses(sockets)[0]
        Server(config, engine, settings.drain_seconds).run(sockets)
    except CannotStart as error:
        _log.error("%s", error)
        raise SystemExit(2) from None
    except SystemExit as ended:
        raise SystemExit(told[0] if told else ended.code) from None
