"""What outlives a restart: job records in a SQLite file, off the event loop; results, as the bytes of their JSON."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from app.engine.types import JobState
from app.jobs.record import JobRecord

FILE_NAME = "jobs.sqlite"
_VERSION = 2  # of the table; a file of another version is refused, not guessed at
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, model TEXT, state TEXT NOT NULL,
    created REAL NOT NULL, started REAL, finished REAL, step INTEGER NOT NULL, total INTEGER, attempts INTEGER NOT NULL,
    error TEXT, request TEXT, key TEXT, fingerprint TEXT
) STRICT
"""
_COLUMNS = (
    "id", "owner", "model", "state", "created", "started", "finished",
    "step", "total", "attempts", "error", "request", "key", "fingerprint",
)  # fmt: skip

Result = TypeVar("Result")


class JobStore:
    """`folder` is made if it is not there; only its owner may read what is written into it.

    `patience` is how long another server that still ends in the same folder is waited for, in seconds.
    """

    def __init__(self, folder: Path, patience: float = 15.0) -> None:
        self._path = folder / FILE_NAME
        self._patience = patience
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="job store")
        self._database: sqlite3.Connection | None = None

    async def open(self) -> list[JobRecord]:
        """What an earlier run has left, oldest first. Raises OSError, sqlite3.Error, ValueError for a strange file."""
        return await self._run(self._open)

    async def put(self, record: JobRecord, *, with_request: bool) -> None:
        """Returns when it is on disk. Raises sqlite3.Error, such as a full disk's."""
        marks = ", ".join("?" * len(_COLUMNS))
        statement = f"INSERT OR REPLACE INTO jobs ({', '.join(_COLUMNS)}) VALUES ({marks})"
        await self._run(self._write, statement, [_row(record, with_request)])

    async def forget(self, ids: Iterable[str]) -> None:
        await self._run(self._write, "DELETE FROM jobs WHERE id = ?", [(identity,) for identity in ids])

    async def close(self) -> None:
        if self._database is not None:
            await self._run(self._database.close)
        self._thread.shutdown()

    async def _run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _write(self, statement: str, rows: list[tuple[object, ...]]) -> None:
        if self._database is None:
            raise RuntimeError("the job store is not open")
        with self._database:
            self._database.executemany(statement, rows)

    def _open(self) -> list[JobRecord]:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite's own files take their mode from this one
        database = self._database = sqlite3.connect(self._path, timeout=self._patience)
        database.execute("PRAGMA locking_mode = EXCLUSIVE")  # two servers would each call the other's jobs lost
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # a 202 is a promise: it outlives a power cut
        [version] = database.execute("PRAGMA user_version").fetchone()
        if version == 1:
            database.execute("ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT ''")
        elif version not in (0, _VERSION):
            raise ValueError(f"{self._path.name} is of version {version}; this server writes version {_VERSION}")
        with database:
            database.execute(_TABLE)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        rows = database.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs ORDER BY created").fetchall()
        return [_record(dict(zip(_COLUMNS, row, strict=True))) for row in rows]


def _row(record: JobRecord, with_request: bool) -> tuple[object, ...]:
    values = {name: getattr(record, name) for name in _COLUMNS}
    values["state"] = record.state.value
    values["error"] = json.dumps(record.error) if record.error is not None else None
    keeps = with_request and record.request is not None
    values["request"] = json.dumps(record.request) if keeps else None
    return tuple(values.values())


def _record(values: dict[str, object]) -> JobRecord:
    for name in ("error", "request"):
        if isinstance(text := values[name], str):
            values[name] = json.loads(text)
    values["state"] = JobState(str(values["state"]))
    return JobRecord(**values)  # type: ignore[arg-type]  # the table's types are the record's


FOLDER_NAME = "results"
_PREFIX = "unfinished-"
_OURS = re.compile(rf"[0-9a-f]{{32}}|{_PREFIX}.*")


class Results:
    """At most `limit` bytes in all, except that the newest result is kept however large it is.

    In `folder` / results each is a file that only its owner may read, named by the job's id; without a folder they are
    held in memory.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self._limit = limit
        self._folder = folder / FOLDER_NAME if folder is not None else None
        self._sizes: dict[str, int] = {}  # oldest first
        self._held: dict[str, bytes] = {}

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self._sizes.values())

    async def open(self, ids: list[str]) -> set[str]:
        """Take over what an earlier run has left of `ids`, oldest first, and delete others of ours; what was found."""
        if self._folder is not None:
            self._sizes = await asyncio.to_thread(_take_over, self._folder, ids)
        return set(self._sizes)

    async def put(self, identity: str, body: bytes) -> list[str]:
        """The ids of those that had to go for it. Raises OSError, such as a full disk's."""
        if self._folder is not None:
            await asyncio.to_thread(_write, self._folder, identity, body)
        else:
            self._held[identity] = body
        self._sizes[identity] = len(body)
        gone = []
        for oldest in list(self._sizes):
            if self.size <= self._limit or oldest == identity:
                break
            gone.append(oldest)
            await self.drop(oldest)
        return gone

    async def get(self, identity: str) -> bytes | None:
        if identity not in self._sizes:
            return None
        if self._folder is None:
            return self._held[identity]
        try:
            return await asyncio.to_thread((self._folder / identity).read_bytes)
        except FileNotFoundError:  # somebody else cleared the folder
            return None

    async def drop(self, identity: str) -> None:
        self._sizes.pop(identity, None)
        self._held.pop(identity, None)
        if self._folder is not None:
            await asyncio.to_thread((self._folder / identity).unlink, missing_ok=True)


def _write(folder: Path, identity: str, body: bytes) -> None:
    """Whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=_PREFIX, delete=False) as file:
        try:
            file.write(body)
            file.close()
            os.replace(file.name, folder / identity)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def _take_over(folder: Path, ids: list[str]) -> dict[str, int]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.iterdir():
        if path.name not in ids and _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    return {identity: path.stat().st_size for identity in ids if (path := folder / identity).is_file()}
