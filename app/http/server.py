"""The HTTP server as a process: it listens until it is told to end, and answers what it has accepted before it does."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine.types import Engine
from app.errors import CannotStart
from app.settings import Settings

_log = logging.getLogger(__name__)

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
        self._told = asyncio.Event()
        self._at_once = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would raise the signal again at the end, which kills the process before its log is written."""
        self._signals += 1
        if self._loop is None:  # not even started: nothing was accepted
            self.should_exit = True
            return
        match self._signals:
            case 1:
                self._loop.call_soon_threadsafe(self._told.set)
            case 2:
                self._loop.call_soon_threadsafe(self._at_once.set)
            case _:
                self.should_exit = self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._leaving = asyncio.create_task(self._leave())
        await super().startup(sockets)

    async def _leave(self) -> None:
        await self._told.wait()
        status = self._engine.status()
        _log.info("told to end: %d jobs run, %d wait, %g seconds", status.running, status.pending, self._drain_seconds)
        try:
            drained = asyncio.create_task(self._engine.drain(self._drain_seconds))
            at_once = asyncio.create_task(self._at_once.wait())
            await asyncio.wait({drained, at_once}, return_when=asyncio.FIRST_COMPLETED)
            if not drained.done():
                await self._engine.drain(0)
            await drained
            at_once.cancel()
        finally:
            self.should_exit = True


def _briefly(app: ASGIApp) -> ASGIApp:
    """Tell of a start that could not be in the sentence of CannotStart; the framework tells it as a stack trace."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_briefly(message: Message) -> None:
            error = sys.exc_info()[1]  # the framework sends from where it has caught it
            if message["type"] == "lifespan.startup.failed" and isinstance(error, CannotStart):
                message = {**message, "message": str(error)}
            await send(message)

        await app(scope, receive, send_briefly if scope["type"] == "lifespan" else send)

    return wrapped


def serve_until_told(app: FastAPI, settings: Settings, engine: Engine) -> None:
    """Serve `app`, whose engine is `engine`. Raises SystemExit with code 3 when it cannot listen or start."""
    config = uvicorn.Config(
        _briefly(app),
        host=settings.host,
        port=settings.port,
        # Else uvicorn takes others where they are installed, with the extra `ray` one that bounds no header.
        http="h11",
        loop="asyncio",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_ANSWERING,
    )
    server = Server(config, engine, settings.drain_seconds)
    server.run()
