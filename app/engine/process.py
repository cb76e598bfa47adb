"""The supervisor's end of one worker process."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from app.engine import worker
from app.engine.messages import Order, Report, Stop
from app.engine.worker import RunnerFactory

# A forked child would share the event loop's descriptors, and CUDA cannot be used in one.
_CONTEXT = multiprocessing.get_context("spawn")


class WorkerProcess:
    """Starts a worker, carries orders to it and reports from it; used once.

    A thread of its own reads the pipe, and orders are written in threads, one at a time: a result of a hundred
    megabytes or a worker that doesn't listen never holds up the event loop.
    """

    def __init__(self, factory: RunnerFactory, device: str) -> None:
        self._factory = factory
        self._device = device
        self._inbox: asyncio.Queue[Report | None] = asyncio.Queue()
        self._outbox: asyncio.Queue[Order] = asyncio.Queue()
        self._connection: Connection | None = None
        self._process: BaseProcess | None = None
        self._reader: threading.Thread | None = None
        self._writer: asyncio.Task[None] | None = None
        self._launch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Raises OSError when the system has no process to give. May be cancelled; `stop` clears up."""
        ours, theirs = _CONTEXT.Pipe(duplex=True)
        process = _CONTEXT.Process(
            target=worker.main, args=(theirs, self._factory, self._device), name=f"worker {self._device}", daemon=True
        )
        self._connection = ours
        self._process = process
        # Shielded: a thread cannot be cancelled, and a child that it starts afterwards would belong to nobody.
        self._launch = asyncio.create_task(asyncio.to_thread(_start, process, theirs))
        await asyncio.shield(self._launch)
        loop = asyncio.get_running_loop()
        self._reader = threading.Thread(target=self._read, args=(ours, loop), name=f"read {self._device}", daemon=True)
        self._reader.start()
        self._writer = loop.create_task(self._write(ours))

    def send(self, order: Order) -> None:
        """Orders arrive in the order sent. One to a dead worker is lost; its death is seen in `reports`."""
        self._outbox.put_nowait(order)

    async def reports(self) -> AsyncIterator[Report]:
        """What the worker says, until it dies."""
        while (report := await self._inbox.get()) is not None:
            yield report

    async def stop(self, seconds: float) -> int | None:
        """Ask the worker to end, kill it after `seconds`; return its exit code. Also clears up after a dead one."""
        if self._launch is not None:
            await asyncio.wait({self._launch})
        if self.pid is not None and self._process is not None:
            self.send(Stop())
            await asyncio.to_thread(_end, self._process, seconds if self._writer is not None else 0.0)
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        if self._reader is not None:
            await asyncio.to_thread(self._reader.join)
        if self._connection is not None:
            self._connection.close()  # only now: a descriptor closed under a reader may be given to another file
        return self._process.exitcode if self._process else None

    def _read(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        report: Report | None
        while True:
            try:
                report = connection.recv()
            except (EOFError, OSError):
                report = None
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._inbox.put_nowait, report)
            if report is None:
                return

    async def _write(self, connection: Connection) -> None:
        while True:
            order = await self._outbox.get()
            with suppress(OSError):  # the worker died; `reports` ends
                await asyncio.to_thread(connection.send, order)


def _start(process: BaseProcess, theirs: Connection) -> None:
    try:
        process.start()
    finally:
        theirs.close()  # a second holder of the worker's end would keep its death from being seen


def _end(process: BaseProcess, seconds: float) -> None:
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
