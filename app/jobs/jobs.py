"""Every request is a job: taken once, run by the engine, ended once; counted, logged and traced at its end."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from app import errors, tracing
from app.engine.types import AnyJob, Engine, Job, JobHandle, JobState, settle
from app.errors import Cancelled, NotReady, ServiceError
from app.jobs.record import LONGEST, Drawn, EventLog, JobRecord, drawn
from app.jobs.store import JobStore, Results
from app.metrics import Metrics
from app.settings import Settings
from models.base import Step

_log = logging.getLogger(__name__)

MOST_KEPT = 10_000  # ended jobs, whatever their results take
KEY_OWNER = "key:"
"""How the name of an owner begins that is an API key. Its jobs are seen by that key alone."""
Resolve = Callable[[Mapping[str, Any], str], Awaitable[Job]]
_LOST = "The server was restarted before the job was done. Send it again."
_PAUSE = 0.5  # seconds between two tries to hand a job of an earlier run to the engine
_TRIM_SECONDS = 60.0  # for which a follower that lost its connection can come back to every event of an ended job


class Jobs:
    """Belongs to one event loop. Every accepted job ends exactly once, as done, failed or cancelled.

    resolve: a body and an id → the job; raises ServiceError. Asked for what an earlier run of the server promised.
    """

    def __init__(self, engine: Engine, metrics: Metrics, resolve: Resolve, settings: Settings) -> None:
        self._engine = engine
        self._metrics = metrics
        self._resolve = resolve
        self._kept_seconds = settings.result_seconds
        self._requeue = settings.jobs_restart == "requeue"
        self._folder = folder = settings.jobs_folder
        self._store = JobStore(folder) if folder is not None else None
        self._results = Results(settings.result_bytes, folder)
        self._records: dict[str, JobRecord] = {}  # oldest first
        self._keys: dict[str, str] = {}
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
            reason = "another server uses it; name another folder, or none to keep jobs in memory" if busy else error
            raise errors.CannotStart(
                f"WAVESPEED_JOBS_FOLDER: {str(self._folder)!r} cannot be used: {reason}"
            ) from error
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
            elif self._requeue and record.request is not None:
                record.state, record.started, record.step = JobState.QUEUED, None, 0
                waiting.append(record)
            else:
                await self._end(record, errors.LostAtRestart(_LOST))
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

    async def submit(
        self,
        job: AnyJob,
        owner: str,
        *,
        ephemeral: bool = False,
        heard: bool = True,
        api: str = "",
        request: Mapping[str, Any] | None = None,
        key: str | None = None,
        fingerprint: str | None = None,
    ) -> JobRecord:
        """The job's record; of an earlier job of this owner, if `key` was used for the same request before.

        ephemeral: the request waits for `record.outcome`. heard: somebody wants to know of each step; telling of them
            costs the drawing time, see docs/decisions/service-cost.md. api: by which API, for `of`.
        Raises IdempotencyConflict, StorageFailed, and what the engine refuses with; a refused job leaves nothing.
        """
        with self.refusals(job.model):
            if key is not None and (known := self._records.get(self._keys.get(key, ""))) is not None:
                if known.fingerprint != fingerprint:
                    conflict = "This Idempotency-Key was used for another request. Use a new one."
                    raise errors.IdempotencyConflict(conflict, field="Idempotency-Key")
                if known.saved is not None:
                    await asyncio.shield(known.saved)
                return known
            record = JobRecord(
                id=job.id, owner=owner, ephemeral=ephemeral, api=api, model=job.model, request=request, key=key,
                fingerprint=fingerprint, events=EventLog(LONGEST if ephemeral else 1),
            )  # fmt: skip
            loop = asyncio.get_running_loop()
            if ephemeral:
                record.future = loop.create_future()
            elif self._store is not None:
                record.saved = loop.create_future()
            # Nothing is awaited between the look above and this: two requests with one key make one job.
            self._hand_over(record, job, heard=heard)
            self._records[record.id] = record
            if key is not None:
                self._keys[key] = record.id
            if record.saved is not None:
                await self._promise(record, record.saved)
            record.forget_upload()  # on disk it stays for as long as a restart needs it
            return record

    async def _promise(self, record: JobRecord, saved: asyncio.Future[None]) -> None:
        """Put it on disk before anybody is told that it was accepted. Raises StorageFailed, and the job is given up."""
        try:
            await self._save(record)
        except (OSError, sqlite3.Error) as error:
            _log.error("job store: %s", error)
            refusal = errors.StorageFailed("The job cannot be recorded: the server's disk fails.", retry_after=30)
            settle(saved, refusal)  # a second caller may read it, or none
            self._engine.cancel(record.id)
            if (watcher := self._watchers.get(record.id)) is not None:
                await asyncio.wait({watcher})
            await self._erase([record.id])
            raise refusal from None
        saved.set_result(None)

    @contextmanager
    def refusals(self, model: str | None = None) -> Iterator[None]:
        """Count, log and trace what fails in the block: a request that never became a job.

        `model`: None where it named none that exists.
        """
        try:
            yield
        except ServiceError as error:
            tracing.ended(self._told(model, error))
            raise
        except Exception:  # a bug of ours is an answer as well, and counted; the middleware writes it
            self._metrics.answered(model, ServiceError.type)
            raise

    def get(self, identity: str, owner: str) -> JobRecord:
        """Raises JobNotFound, also for the job of another key."""
        record = self._records.get(identity)
        foreign = record is not None and record.owner.startswith(KEY_OWNER) and record.owner != owner
        if record is None or record.ephemeral or foreign:
            raise errors.JobNotFound("There is no such job, or it ended so long ago that it was forgotten.")
        return record

    def of(self, owner: str, api: str) -> list[JobRecord]:
        """The owner's jobs under way that came by this API, the oldest first."""
        return [one for one in self._records.values() if (one.owner, one.api, one.ended) == (owner, api, False)]

    def kept(self, owner: str) -> Iterator[JobRecord]:
        """The owner's jobs, under way or ended, that are not forgotten yet, the newest first."""
        return (one for one in reversed(self._records.values()) if one.owner == owner and not one.ephemeral)

    def waiting(self) -> list[JobRecord]:
        """Everybody's jobs that no worker has yet."""
        return [one for one in self._records.values() if one.state is JobState.QUEUED and not one.ended]

    async def result(self, record: JobRecord) -> bytes | None:
        """The answer of a job that is done, as JSON. Raises JobNotFound when it was dropped at this very moment."""
        if record.state is not JobState.DONE:
            return None
        body = await self._results.get(record.id)
        if body is None:
            raise errors.JobNotFound("The job's result is no longer kept.")
        return body

    def leave(self, record: JobRecord) -> None:
        """Nobody waits for it any more; one that has ended stays as it is."""
        if not record.ended:
            self._engine.cancel(record.id)

    async def cancel(self, record: JobRecord) -> None:
        """Once more changes nothing. Raises JobFinished for one that ended otherwise."""
        if record.state is JobState.CANCELLED:
            return
        if record.handle is None and not record.ended:  # of an earlier run, not yet with the engine
            await self._end(record, Cancelled("The job was cancelled."))
            return
        if record.ended or not self._engine.cancel(record.id):
            raise errors.JobFinished("The job has ended already. There was nothing to cancel.")
        if (watcher := self._watchers.get(record.id)) is not None:
            await asyncio.wait({watcher})

    async def forget(self, record: JobRecord) -> None:
        """With its pictures, for good; one that is under way is given up first."""
        if not record.ended:
            await self.cancel(record)
        await self._erase([record.id])

    def _hand_over(self, record: JobRecord, job: AnyJob, *, heard: bool = True, promised: bool = False) -> None:
        if isinstance(job, Job):
            job = replace(job, params=replace(job.params, owner=record.owner))
        on_step = partial(self._stepped, record, job) if heard or _log.isEnabledFor(logging.DEBUG) else None
        handle = record.handle = self._engine.submit(job, on_step, promised=promised)
        if record.request is not None and isinstance(job, Job):
            record.request = {**record.request, "model": job.model, "seed": job.params.seeds[0]}
        if not handle.settled:
            handle.on_change = partial(self._changed, record, handle)
            self._changed(record, handle)
        watcher = self._watchers[record.id] = asyncio.create_task(self._watch(record, handle))
        watcher.add_done_callback(lambda _: self._watchers.pop(record.id))

    def _stepped(self, record: JobRecord, job: AnyJob, step: Step) -> None:
        fields = {"strategy": job.strategy.name, "step": step.index + 1, "total": step.total, "decision": step.decision}
        _log.debug(
            "cache strategy=%s step=%d/%d decision=%s",
            *fields.values(),
            extra={"request_id": job.id, "fields": fields},  # called outside the request's context, hence the id
        )
        record.step, record.total = step.index + 1, step.total
        at = {"step": step.index + 1, "total": step.total}
        record.events.publish("progress", {**at, "decision": step.decision})
        if step.preview is not None:
            image = base64.b64encode(step.preview).decode("ascii")
            record.events.publish("preview", {**at, "image": image, "media_type": "image/jpeg"})

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
        """To the end of the job. In the context of the request that submitted it: its log id, its span."""
        outcome: Drawn | ServiceError
        gone: list[str] = []
        try:
            result = await handle.result
            outcome = drawn(handle.job, result, queue_seconds=handle.queue_seconds, total_seconds=handle.total_seconds)
            if not record.ephemeral:
                body = await asyncio.to_thread(lambda one: json.dumps(one.answer()).encode(), outcome)
                gone = await self._results.put(record.id, body)
        except ServiceError as error:
            outcome = error
        except OSError as error:
            _log.error("results: %s", error)
            outcome = errors.StorageFailed("The pictures cannot be kept: the server's disk fails.", retry_after=30)
        except Exception:  # noqa: BLE001  # a bug of ours: whoever waits for the job must not wait for ever
            _log.exception("internal error")
            outcome = ServiceError("The server made a mistake; its log has it.")
        resumed = self._requeue and not record.ephemeral and self._engine.status().draining
        if isinstance(outcome, NotReady) and resumed:
            # Its row on disk still says that it waits, and the next run of the server takes it up.
            record.events.publish("error", outcome.body(record.id))
            return
        if record.saved is None or not (record.saved.done() and record.saved.exception()):
            figures = self._told(record.model, outcome, record.id)
            if record.ephemeral:
                tracing.ended(figures)
            else:
                tracing.job_ended(record.id, handle.total_seconds, figures)
        await self._end(record, outcome)
        await self._erase(gone)

    def _told(self, model: str | None, outcome: Drawn | ServiceError, job_id: str | None = None) -> dict[str, object]:
        """Count and log an end, the one place where that happens; what a trace is told of it.

        `job_id`: of one that does not end within its request, whose id the log knows.
        """
        if isinstance(outcome, Drawn):
            kind, figures = "ok", outcome.figures()
            self._metrics.generated(
                outcome.cache_use,
                images=len(outcome.images),
                batches=outcome.batches,
                reused_runs=outcome.reused_runs,
                **outcome.seconds,
            )
            did = "cache" if outcome.job.model else "upscaled"
            words = " ".join([did, *(f"{name}={value}" for name, value in figures.items())])
        else:
            kind, figures = outcome.type, {"status": outcome.status, "type": outcome.type, "field": outcome.field}
            words = f"refused {' '.join(f'{name}={value}' for name, value in figures.items())}: {outcome.message}"
        self._metrics.answered(model, kind)
        extra: dict[str, object] = {"fields": figures} if job_id is None else {"fields": figures, "request_id": job_id}
        _log.info("%s", words, extra=extra)
        return {"outcome": kind, "model": model, **(figures if kind == "ok" else {})}

    async def _end(self, record: JobRecord, outcome: Drawn | ServiceError) -> None:
        record.handle = None
        if isinstance(outcome, Drawn):
            record.end(JobState.DONE)
            record.events.publish("done", {"id": record.id, "location": f"/api/jobs/{record.id}"})
        else:
            body = outcome.body(record.id)
            record.end(JobState.CANCELLED if isinstance(outcome, Cancelled) else JobState.FAILED, body["error"])
            record.events.publish("error", body)
            if outcome.status >= 500:
                self._free_key(record)  # what may pass is to be tried again, with the same key
                record.key = None
        if record.ephemeral:
            del self._records[record.id]
            settle(record.outcome, outcome)
            return
        record.forget_upload()
        asyncio.get_running_loop().call_later(_TRIM_SECONDS, record.events.trim)
        self._forget_later(record)
        try:
            await self._save(record)
        except (OSError, sqlite3.Error) as failure:
            _log.error("job store: %s; a restart will not know how this job ended", failure)

    async def _save(self, record: JobRecord) -> None:
        if self._store is not None:
            await self._store.put(record, with_request=self._requeue or record.ended)

    def _free_key(self, record: JobRecord) -> None:
        if record.key is not None and self._keys.get(record.key) == record.id:
            del self._keys[record.key]

    def _forget_later(self, record: JobRecord) -> None:
        age = time.time() - (record.finished or time.time())
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, self._kept_seconds - age), self._spawn_erase, [record.id])
        if len(self._records) > MOST_KEPT:
            self._spawn_erase([next(kept.id for kept in self._records.values() if kept.ended)])

    def _spawn_erase(self, ids: list[str]) -> None:
        if self._stopped:
            return  # the next run of the server sees to it
        task = asyncio.get_running_loop().create_task(self._erase(ids))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _erase(self, ids: Iterable[str]) -> None:
        for identity in ids:
            record = self._records.pop(identity, None)
            if record is not None:
                self._free_key(record)
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
                    job = await self._resolve(record.request or {}, record.id)
                    if record.ended:  # cancelled meanwhile
                        break
                    self._hand_over(record, job, promised=True)
                    record.model = job.model
                    record.forget_upload()
                except NotReady:
                    await asyncio.sleep(_PAUSE)
                except ServiceError as error:  # the model is gone, or an update refuses what was fine before
                    await self._end(record, error)
