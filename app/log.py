"""Where the service's words go: `server.log` and stderr, with a request id in every line."""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from app.settings import LogFormat
from app.tracing import trace_id

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request that is being answered; set by the outermost middleware."""

FILE_NAME = "server.log"
_MAX_BYTES = 5 * 2**20
_BACKUPS = 3


class _LineFormatter(logging.Formatter):
    """Time (UTC), level, request id, logger, message.

    Each line of a message of several lines, such as a stack trace, gets the same prefix, and control characters are
    escaped: nothing that a client sends can look like a line of ours.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        prefix = f"{_time(record)} {record.levelname:<7} request={getattr(record, 'request_id', '-')} {record.name}: "
        return "\n".join(prefix + _printable(line) for line in text.split("\n"))


class _JsonFormatter(logging.Formatter):
    """A JSON object a record, on a line of its own: what `_LineFormatter` writes, and the record's `fields` by name.

    A stack trace is one string, `exception`. Everything but ASCII is escaped.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "request_id": getattr(record, "request_id", "-"),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (trace := getattr(record, "trace_id", None)) is not None:
            entry["trace_id"] = trace
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps({**entry, **getattr(record, "fields", {}), **entry}, default=str)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line)


def _stamp(record: logging.LogRecord) -> bool:
    """Taken where the record is made: the thread that writes it knows of no request."""
    if not hasattr(record, "request_id"):
        record.request_id = request_id.get()
    record.trace_id = trace_id()
    return True


@contextmanager
def logging_to(folder: Path, level: str, form: LogFormat = "console") -> Iterator[Path]:
    """Send every logger's records at `level` and above to `folder`/server.log and stderr; yields the file's path.

    `form`: a line for people, or a JSON object a line, in both places.
    They are written by a thread: a slow or full disk holds up no request. Raises OSError when the file can't be opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    file = logging.handlers.RotatingFileHandler(path, maxBytes=_MAX_BYTES, backupCount=_BACKUPS, encoding="utf-8")
    outputs: list[logging.Handler] = [file, logging.StreamHandler(sys.stderr)]
    for output in outputs:
        output.setFormatter(_JsonFormatter() if form == "json" else _LineFormatter())
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    entrance = _Entrance(records)
    entrance.addFilter(_stamp)
    listener = logging.handlers.QueueListener(records, *outputs)
    root = logging.getLogger()
    before = root.level
    root.addHandler(entrance)
    root.setLevel(level)
    # Third parties are heard from their warnings on: at DEBUG the log is to hold our steps, not their polling.
    quiet = [logging.getLogger(name) for name in ("asyncio", "httpx", "httpcore", "PIL", "uvicorn.access")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.WARNING)
    listener.start()
    try:
        yield path
    finally:
        root.removeHandler(entrance)
        root.setLevel(before)
        for logger, old in zip(quiet, levels, strict=True):
            logger.setLevel(old)
        listener.stop()
        for output in outputs:
            output.close()


class _Entrance(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Only the message is settled here; the rest stays as it is, since the record never leaves the process."""
        record.msg, record.args = record.getMessage(), None
        return record
