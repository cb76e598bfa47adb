"""One request's way from its fields to pictures: what every endpoint does that waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request

from app.engine.types import Job, JobHandle, JobResult, OutputFormat, StepListener
from app.errors import Cancelled, ServiceError
from app.http import outcome
from app.http.request import read_object, request_id_of, service_of
from app.http.resolve import Limits, resolve_aside
from app.http.schemas import GenerateRequest
from models.base import Step

_log = logging.getLogger(__name__)


class Attempt:
    """Counted and logged once, however it ends: everything between the request and its answer happens in `counted`."""

    def __init__(self, request: Request) -> None:
        self.service = service_of(request)
        self._request = request
        self._model: str | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        """An end by an exception is counted and logged here, the good one by `result` or `done`."""
        metrics = self.service.metrics
        try:
            yield
        except ServiceError as error:
            outcome.refused(metrics, self._model, error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            metrics.answered(self._model, Cancelled.type)
            raise
        except Exception:  # a bug of ours is an answer as well, and counted; the middleware writes it
            metrics.answered(self._model, ServiceError.type)
            raise

    async def body(self) -> dict[str, Any]:
        """The request's JSON object. Raises what `read_object` raises."""
        return await read_object(self._request, self.service.settings)

    async def job(self, fields: GenerateRequest, output_format: OutputFormat | None = None) -> Job:
        """Raises what `resolve` raises, and NotReady while the models are not known yet."""
        limits = Limits.of(self.service.settings)
        catalogue = self.service.engine.catalogue()
        wanted = output_format or fields.output_format
        job = await resolve_aside(fields, catalogue, limits, request_id_of(self._request), wanted)
        self._model = job.model
        return job

    def submit(self, job: Job, on_step: StepListener | None = None) -> JobHandle:
        """Raises what the engine refuses with. `on_step` is called in the event loop."""
        if not _log.isEnabledFor(logging.DEBUG):
            return self.service.engine.submit(job, on_step)

        def logged(step: Step) -> None:
            outcome.stepped(job, step)
            if on_step is not None:
                on_step(step)

        return self.service.engine.submit(job, logged)

    async def result(self, handle: JobHandle) -> JobResult:
        """The job's result, unless the client leaves first; then the job is cancelled. The server doesn't do it for us.

        Not for an answer that has begun: the server listens for the client's leaving itself then.
        """
        gone = asyncio.create_task(self._disconnected())
        try:
            either: set[asyncio.Future[Any]] = {handle.result, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not handle.result.done():
                raise Cancelled("The client left before the picture was done.")
        finally:
            gone.cancel()
            self.give_up(handle)
        return self.done(handle)

    def done(self, handle: JobHandle) -> JobResult:
        """The result of a handle that is settled. Raises the error that it was settled with."""
        result = handle.result.result()
        outcome.done(self.service.metrics, handle, result)
        return result

    def give_up(self, handle: JobHandle) -> None:
        """Nobody waits any more; a job that is done stays so."""
        if not handle.result.done():
            self.service.engine.cancel(handle.job.id)

    async def _disconnected(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
