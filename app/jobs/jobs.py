"""The jobs of POST /api/jobs: taken once, run by the engine, ended once, kept for a while."""

from __future__ import annotations

import asyncio
import base64
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.engine.types import Engine, Job, JobHandle, JobResult, JobState
from app.errors import (
    Cancelled,
    CannotStart,
    IdempotencyConflict,
    JobFinished,
    JobNotFound,
    LostAtRestart,
    NotReady,
    ServiceError,
    StorageFailed,
)
from app.jobs.record import JobRecord
from app.jobs.store import JobStore, Results
from models.base import Step

_log = logging.getLogger(__name__)

MOST_KEPT = 10_000  # ended jobs, whatever their results take
_LOST = "The server was restarted before the job was done. Send it again."
_PAUSE = 0.5  # seconds between two tries to hand a job of an earlier run to the engine
_TRIM_SECONDS = 60.0  # for which a follower that lost its connection can come back to every event of an ended job


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How long and where. `folder` None: in memory. `requeue`: a restart takes up what was not done."""

    seconds: float = 3600.0
    result_bytes: int = 512 * 2**20
    folder: Path | None = None
    requeue: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the board leaves to the HTTP side.

    `resolve`: body and id → job; raises ServiceError. `render`: a done job's answer, as JSON; runs in a thread.
    `ended`: called once for each job that was taken, with its result or its error. `stepped`: called for each step.
    """

    resolve: Callable[[Mapping[str, Any], str], Awaitable[Job]]
    render: Callable[[JobHandle, JobResult], bytes]
    ended: Callable[[JobHandle, JobResult | ServiceError], None]
    stepped: Callable[[Job, Step], None]


class JobBoard:
    """Belongs to one event loop. Every accepted job ends exactly once, as done, failed or cancelled."""

    def __init__(self, engine: Engine, hooks: Hooks, keeping: Keeping) -> None:
        self._engine = engine
        self._hooks = hooks
        self._keeping = keeping
        self._store = JobStore(keeping.folder) if keeping.folder is not None else None
        self._results = Results(keeping.result_bytes, keeping.folder)
        self._records: dict[str, JobRecord] = {}  # oldest first
        self._keys: dict[str, str] = {}
        self._refused: set[str] = set()  # given back by the engine, since they could not be recorded
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._resuming: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Raises CannotStart when the folder cannot be used."""
        try:
            records = await self._store.open() if self._store is not None else []
            found = await self._results.open([record.id for record in records if record.state is JobState.DONE])
        except (OSError, sqlite3.Error, ValueError) as error:
            busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            reason = "another server uses it" if busy else error
            folder = str(self._keeping.folder)
            raise CannotStart(f"WAVESPEED_JOBS_FOLDER: {folder!r} cannot be used: {reason}") from error
        waiting = []
        for record in records:
            if record.state is JobState.DONE and record.id not in found:
                await self._erase([record.id])
                continue
            self._records[record.id] = record
            if record.key is not None:
                self._keys[record.key] = record.id
            if record.ended:
                self._forget_later(record)
            elif self._keeping.requeue and record.request is not None:
                record.state, record.started, record.step = JobState.QUEUED, None, 0
                waiting.append(record)
            else:
                self._keys.pop(record.key or "", None)
                record.key = None  # the same request, sent again with the same key, is to be run
                await self._end(record, JobState.FAILED, LostAtRestart(_LOST))
        if waiting:
            _log.info("%d jobs of the last run are taken up again", len(waiting))
            self._resuming = asyncio.create_task(self._resume(waiting))

    async def stop(self) -> None:
        """After the engine has settled every job."""
        self._stopped = True
        if self._resuming is not None:
            self._resuming.cancel()
            await asyncio.gather(self._resuming, return_exceptions=True)
        while tasks := [*self._tasks, *self._watchers.values()]:
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._store is not None:
            await self._store.close()

    def __len__(self) -> int:
        return len(self._records)

    async def submit(self, job: Job, request: Mapping[str, Any], key: str | None, fingerprint: str) -> JobRecord:
        """The job's record; of an earlier job, if `key` was used for the same request before.

        Raises IdempotencyConflict, StorageFailed, and what the engine refuses with; a refused job leaves nothing.
        """
        if key is not None and (known := self._records.get(self._keys.get(key, ""))) is not None:
            if known.fingerprint != fingerprint:
                raise IdempotencyConflict(
                    "This Idempotency-Key was used for another request. Use a new one.", field="Idempotency-Key"
                )
            return known
        record = JobRecord(id=job.id, model=job.model, request=request, key=key, fingerprint=fingerprint)
        # Nothing is awaited between the look above and this: two requests with one key make one job.
        self._hand_over(record, job, promised=False)
        self._records[record.id] = record
        if key is not None:
            self._keys[key] = record.id
        try:
            await self._save(record)
        except (OSError, sqlite3.Error) as error:
            _log.error("job store: %s", error)
            self._refused.add(record.id)
            self._engine.cancel(record.id)
            if (watcher := self._watchers.get(record.id)) is not None:
                await asyncio.wait({watcher})
            self._refused.discard(record.id)
            await self._erase([record.id])
            raise StorageFailed("The job cannot be recorded: the server's disk fails.", retry_after=30) from None
        record.request = None  # it may hold a picture; on disk it stays for as long as a restart needs it
        return record

    def get(self, identity: str) -> JobRecord:
        """Raises JobNotFound."""
        try:
            return self._records[identity]
        except KeyError:
            raise JobNotFound("There is no such job, or it ended so long ago that it was forgotten.") from None

    async def result(self, record: JobRecord) -> bytes | None:
        """The answer of a job that is done. Raises JobNotFound when it was dropped at this very moment."""
        if record.state is not JobState.DONE:
            return None
        body = await self._results.get(record.id)
        if body is None:
            raise JobNotFound("The job's result is no longer kept.")
        return body

    async def cancel(self, identity: str) -> JobRecord:
        """Once more changes nothing. Raises JobNotFound; JobFinished for one that ended otherwise."""
        record = self.get(identity)
        if record.state is JobState.CANCELLED:
            return record
        if record.handle is None and not record.ended:  # of an earlier run, not yet with the engine
            await self._end(record, JobState.CANCELLED, Cancelled("The job was cancelled."))
            return record
        if record.ended or not self._engine.cancel(identity):
            raise JobFinished("The job has ended already. There was nothing to cancel.")
        if (watcher := self._watchers.get(identity)) is not None:
            await asyncio.wait({watcher})
        return record

    def _hand_over(self, record: JobRecord, job: Job, *, promised: bool) -> None:
        def on_step(step: Step) -> None:
            self._hooks.stepped(job, step)
            record.step, record.total = step.index + 1, step.total
            at = {"step": step.index + 1, "total": step.total}
            record.events.publish("progress", {**at, "decision": step.decision})
            if step.preview is not None:
                image = base64.b64encode(step.preview).decode("ascii")
                record.events.publish("preview", {**at, "image": image, "media_type": "image/jpeg"})

        handle = record.handle = self._engine.submit(job, on_step, promised=promised)
        handle.on_change = lambda: self._changed(record, handle)
        self._changed(record, handle)
        watcher = self._watchers[record.id] = asyncio.create_task(self._watch(record, handle))
        watcher.add_done_callback(lambda _: self._watchers.pop(record.id))

    def _changed(self, record: JobRecord, handle: JobHandle) -> None:
        if handle.settled:
            return
        record.state, record.attempts = handle.state, handle.attempts
        if handle.state is JobState.RUNNING:
            record.started, record.step = record.started or time.time(), 0
            record.events.publish("running", {"attempt": handle.attempts})
        else:
            record.events.publish("queued", {"position": handle.place})

    async def _watch(self, record: JobRecord, handle: JobHandle) -> None:
        outcome: JobResult | ServiceError
        gone: list[str] = []
        try:
            outcome = await handle.result
            body = await asyncio.to_thread(self._hooks.render, handle, outcome)
            gone = await self._results.put(record.id, body)
        except ServiceError as error:
            outcome = error
        except OSError as error:
            _log.error("results: %s", error)
            outcome = StorageFailed("The pictures cannot be kept: the server's disk fails.", retry_after=30)
        except Exception:  # noqa: BLE001  # a bug of ours: whoever polls the job must not poll for ever
            _log.exception("internal error")
            outcome = ServiceError("The server made a mistake; its log has it.")
        if isinstance(outcome, NotReady) and self._keeping.requeue and self._engine.status().draining:
            # Its row on disk still says that it waits, and the next run of the server takes it up.
            record.events.publish("error", outcome.body(record.id))
            return
        if record.id not in self._refused:
            self._hooks.ended(handle, outcome)
        if isinstance(outcome, JobResult):
            await self._end(record, JobState.DONE)
        else:
            await self._end(record, handle.state if handle.state is JobState.CANCELLED else JobState.FAILED, outcome)
        for identity in gone:
            await self._erase([identity])

    async def _end(self, record: JobRecord, state: JobState, error: ServiceError | None = None) -> None:
        body = error.body(record.id) if error is not None else None
        record.end(state, body["error"] if body is not None else None)
        record.handle = None
        if body is None:
            record.events.publish("done", {"id": record.id, "location": f"/api/jobs/{record.id}"})
        else:
            record.events.publish("error", body)
        asyncio.get_running_loop().call_later(_TRIM_SECONDS, record.events.trim)
        self._forget_later(record)
        try:
            await self._save(record)
        except (OSError, sqlite3.Error) as failure:
            _log.error("job store: %s; a restart will not know how this job ended", failure)

    async def _save(self, record: JobRecord) -> None:
        if self._store is not None:
            await self._store.put(record, with_request=self._keeping.requeue and not record.ended)

    def _forget_later(self, record: JobRecord) -> None:
        age = time.time() - (record.finished or time.time())
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, self._keeping.seconds - age), self._spawn_erase, [record.id])
        if len(self._records) > MOST_KEPT:
            self._spawn_erase([next(kept.id for kept in self._records.values() if kept.ended)])

    def _spawn_erase(self, ids: list[str]) -> None:
        if self._stopped:
            return  # the next run of the server sees to it
        task = asyncio.get_running_loop().create_task(self._erase(ids))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _erase(self, ids: list[str]) -> None:
        for identity in ids:
            record = self._records.pop(identity, None)
            if record is not None and record.key is not None and self._keys.get(record.key) == identity:
                del self._keys[record.key]
            await self._results.drop(identity)
        if self._store is not None:
            try:
                await self._store.forget(ids)
            except sqlite3.Error as error:
                _log.error("job store: %s", error)

    async def _resume(self, records: list[JobRecord]) -> None:
        """Hand jobs of an earlier run to the engine, oldest first, as soon as it takes jobs."""
        for record in records:
            while not record.ended and record.handle is None:
                try:
                    job = await self._hooks.resolve(record.request or {}, record.id)
                    if record.ended:  # cancelled meanwhile
                        break
                    self._hand_over(record, job, promised=True)
                    record.model, record.request = job.model, None
                except NotReady:
                    await asyncio.sleep(_PAUSE)
                except ServiceError as error:  # the model is gone, or an update refuses what was fine before
                    await self._end(record, JobState.FAILED, error)
