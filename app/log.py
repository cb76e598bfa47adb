"""Where the service's words go: `server.log` and stderr, with a request id in every line.

The two are independent, and nobody who logs waits for either: each has a thread and a queue of bounded size. What does
not fit is dropped, and its place says how many lines that were.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from app.errors import CannotStart
from app.settings import LogFormat
from app.tracing import trace_id

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request that is being answered; set by the outermost middleware."""

FILE_NAME = "server.log"
ENDING = 3.0  # seconds at the end for what is queued to be written
_MAX_BYTES = 5 * 2**20
_BACKUPS = 3
_FILE_ROOM, _STDERR_ROOM = 32 * 2**20, 2**20  # bytes that may wait
_RETRY = 1.0  # seconds after a write that failed
_LONGEST = 2**13  # bytes of a foreign line on stderr that are passed on at once
# Third parties are heard from their warnings on: at DEBUG the log is to hold our steps, not their polling.
_QUIET = [
    logging.Filter(name)
    for name in ("asyncio", "httpx", "httpx2", "httpcore", "httpcore2", "PIL", "uvicorn.access", "websockets")
]
_END = b"\0 the end of what is written to stderr\n"


class _LineFormatter(logging.Formatter):
    """Time (UTC), level, request id, logger, message.

    Each line of a message of several lines, such as a stack trace, gets the same prefix, and control characters are
    escaped: nothing that a client sends can look like a line of ours.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        prefix = f"{_time(record)} {record.levelname:<7} request={_request(record)} {record.name}: "
        return "\n".join(prefix + _printable(line) for line in text.split("\n"))


class _JsonFormatter(logging.Formatter):
    """A JSON object a record, on a line of its own: what `_LineFormatter` writes, and the record's `fields` by name.

    A stack trace is one string, `exception`. Everything but ASCII is escaped.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "request_id": _request(record),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (trace := trace_id()) is not None:
            entry["trace_id"] = trace
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps({**entry, **getattr(record, "fields", {}), **entry}, default=str)


def _request(record: logging.LogRecord) -> str:
    return str(getattr(record, "request_id", request_id.get()))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line)


class _Outlet(threading.Thread):
    """Carries lines to `write`, which may never come back, or raise OSError or ValueError. A daemon, for the former.

    `room`: bytes that may wait. `notice`: what stands in the place of so many lines that did not fit. A line that
    could not be written is tried again.
    """

    def __init__(self, name: str, write: Callable[[bytes], object], room: int, notice: Callable[[int], bytes]) -> None:
        super().__init__(name=f"log to {name}", daemon=True)
        self._write, self._room, self._notice = write, room, notice
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._lost = 0  # lines, since that was told last
        self._news = threading.Condition()
        self._ending = threading.Event()
        self.start()

    def put(self, line: bytes) -> None:
        with self._news:
            # Once a line is lost the next ones are too, until the queue is empty and the loss told: in its place.
            if self._lost or (self._lines and self._bytes + len(line) > self._room):
                self._lost += 1
            else:
                self._lines.append(line)
                self._bytes += len(line)
            self._news.notify()

    def run(self) -> None:
        while (item := self._next()) is not None:
            line, lost = item
            try:
                self._write(line)
            except (OSError, ValueError):  # no room on the disk, nobody at the other end, a stream that is closed
                with self._news:
                    self._lost += lost
                    if not lost:
                        self._lines.appendleft(line)
                        self._bytes += len(line)
                if self._ending.is_set():
                    return
                self._ending.wait(_RETRY)

    def _next(self) -> tuple[bytes, int] | None:
        """A line, and how many lost ones it tells of."""
        with self._news:
            self._news.wait_for(lambda: self._lines or self._lost or self._ending.is_set())
            if self._lines:
                line = self._lines.popleft()
                self._bytes -= len(line)
                return line, 0
            lost, self._lost = self._lost, 0
            return (self._notice(lost), lost) if lost else None

    def end(self, deadline: float) -> bool:
        """Whether all that waited is written by then, on the monotonic clock."""
        with self._news:
            self._ending.set()
            self._news.notify()
        self.join(max(0.0, deadline - time.monotonic()))
        return not self.is_alive()


class _File:
    """`server.log`, which becomes server.log.1 when it is full, and so on. After an OSError it can be tried again.

    Unbuffered, and no handler of `logging`: a thread that hangs in a write holds no lock that the end waits for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, line: bytes) -> None:
        if self._descriptor < 0:
            self._open()
        size = os.fstat(self._descriptor).st_size
        if size and size + len(line) > _MAX_BYTES:
            self.close()
            names = [self._path, *(self._path.with_name(f"{FILE_NAME}.{number + 1}") for number in range(_BACKUPS))]
            for newer, older in reversed(list(itertools.pairwise(names))):
                with suppress(FileNotFoundError):
                    newer.replace(older)
            self._open()
        try:
            _write_all(self._descriptor, line)
        except OSError:
            os.ftruncate(self._descriptor, size)  # no half lines
            raise

    def close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


def _write_all(descriptor: int, line: bytes) -> None:
    """Past Python's buffers, whose locks the interpreter wants at its end."""
    while line:
        line = line[os.write(descriptor, line) :]


@contextmanager
def logging_to(folder: Path, level: str, form: LogFormat = "console", *, whole_stderr: bool = False) -> Iterator[Path]:
    """Send every logger's records at `level` and above to `folder`/server.log and stderr; yields the file's path.

    `form`: a line for people, or a JSON object a line, in both places. `whole_stderr`: what else is written to this
    process's descriptor 2, by libraries and by the processes that it starts, goes the same way: a stderr that nobody
    reads holds up none of them. At the end what waits is written for ENDING seconds; the rest is given up.
    Raises CannotStart when the file can't be opened.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _File(folder / FILE_NAME)
    except OSError as error:
        reason = error.strerror or error
        raise CannotStart(f"WAVESPEED_LOG_FOLDER: {str(folder)!r} cannot be written to: {reason}.") from error
    formatter = _JsonFormatter() if form == "json" else _LineFormatter()

    def notice(lines: int) -> bytes:
        said = f"{lines} lines are missing here: they came faster than they were taken"
        return _line(formatter, logging.LogRecord(__name__, logging.WARNING, "", 0, said, (), None))

    to_file = _Outlet("file", file.write, _FILE_ROOM, notice)
    root = logging.getLogger()
    before = root.level
    try:
        with _stderr(notice, whole_stderr) as to_stderr:
            entrance = _Entrance(formatter, (to_file, to_stderr))
            root.addHandler(entrance)
            root.setLevel(level)
            try:
                yield folder / FILE_NAME
            finally:
                root.removeHandler(entrance)
                root.setLevel(before)
    finally:
        if to_file.end(time.monotonic() + ENDING):
            file.close()


class _Entrance(logging.Handler):
    """Words are settled where they are said: the threads that write them know of no request."""

    def __init__(self, formatter: logging.Formatter, outlets: tuple[_Outlet, ...]) -> None:
        super().__init__()
        self._form = formatter
        self._outlets = outlets
        self.addFilter(lambda record: record.levelno >= logging.WARNING or not any(q.filter(record) for q in _QUIET))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = _line(self._form, record)
        except Exception:  # noqa: BLE001  # a message that does not fit its arguments must not fail who logs it
            self.handleError(record)
            return
        for outlet in self._outlets:
            outlet.put(line)


def _line(formatter: logging.Formatter, record: logging.LogRecord) -> bytes:
    return f"{formatter.format(record)}\n".encode()


@contextmanager
def _stderr(notice: Callable[[int], bytes], whole: bool) -> Iterator[_Outlet]:
    """What takes lines for stderr; with `whole`, all that is written to descriptor 2 as well."""
    if not whole or sys.stderr is None:
        outlet = _Outlet("stderr", _stream(), _STDERR_ROOM, notice)
        try:
            yield outlet
        finally:
            outlet.end(time.monotonic() + ENDING)
        return
    ours = os.dup(2)
    outlet = _Outlet("stderr", partial(_write_all, ours), _STDERR_ROOM, notice)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    faulthandler.enable(ours)  # a crash of this process leaves nobody to carry its words on
    reader = threading.Thread(target=_pass_on, args=(reading, outlet), name="read stderr", daemon=True)
    reader.start()
    try:
        yield outlet
    finally:
        sys.stderr.flush()
        os.write(writing, _END)  # closing it would not do: other processes hold it for longer
        reader.join()
        written = outlet.end(time.monotonic() + ENDING)
        os.dup2(ours if written else os.open(os.devnull, os.O_WRONLY), 2)
        faulthandler.enable(2)
        os.close(writing)


def _stream() -> Callable[[bytes], object]:
    stream = sys.stderr
    if stream is None:
        return len
    try:
        return partial(_write_all, stream.fileno())
    except OSError:  # it stands for stderr, and is no file
        return lambda line: stream.write(line.decode())


def _pass_on(descriptor: int, outlet: _Outlet) -> None:
    with os.fdopen(descriptor, "rb") as pipe:
        for line in iter(partial(pipe.readline, _LONGEST), b""):
            if rest := line.removesuffix(_END):
                outlet.put(rest)
            if line.endswith(_END):
                return
