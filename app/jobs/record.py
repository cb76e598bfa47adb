"""What is known of one job while it is on its way and for some time after, and what happened to it, in order."""

from __future__ import annotations

import asyncio
import base64
import pickle
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from app.engine.types import AnyJob, Job, JobHandle, JobResult, JobState
from app.metrics import CacheUse

EventName = Literal["queued", "running", "progress", "preview", "done", "error"]

LONGEST = 2048  # events kept of one job: more than the longest request has steps
LEFT_OUT = "left_out"
"""Beside the fields of a kept request: the names of those that were too long to be kept, which hold pictures."""
_LONGEST_REQUEST = 64 * 2**10  # bytes of a request that is kept for as long as its job


@dataclass(frozen=True, slots=True)
class Event:
    """`number` counts from 1; it is the server-sent event's id."""

    number: int
    name: EventName
    data: Mapping[str, Any]


class EventLog:
    """The events of one job. Belongs to one event loop; ends with a `done` or an `error`.

    Of previews, which are large, only the newest `previews` are kept.
    """

    def __init__(self, previews: int = 1) -> None:
        self._previews = previews
        self._events: deque[Event] = deque(maxlen=LONGEST)
        self._news = asyncio.Event()
        self.last = 0
        self.ended = False

    def publish(self, name: EventName, data: Mapping[str, Any]) -> None:
        """What comes after the end is dropped: a job ends once."""
        if self.ended:
            return
        if name == "preview":
            kept = [event for event in self._events if event.name == "preview"]
            for event in kept[: len(kept) + 1 - self._previews]:
                self._events.remove(event)
        self.last += 1
        self._events.append(Event(self.last, name, data))
        self.ended = name in ("done", "error")
        self._news.set()
        self._news = asyncio.Event()

    def newest(self, name: EventName) -> Event | None:
        return next((event for event in reversed(self._events) if event.name == name), None)

    def trim(self) -> None:
        """Keep the end alone."""
        while len(self._events) > 1:
            self._events.popleft()

    async def follow(self, after: int = 0) -> AsyncIterator[Event]:
        """Every kept event whose number is greater than `after`, then each new one until the end."""
        after = min(after, self.last)  # a client of an earlier run of the server may have counted further
        while True:
            news = self._news
            for event in [event for event in self._events if event.number > after]:
                after = event.number
                yield event
            if self.ended and after >= self.last:
                return
            await news.wait()


async def spaced(events: AsyncIterator[Event], silence: float) -> AsyncIterator[Event | None]:
    """The events, and None whenever there was none for `silence` seconds."""
    following = aiter(events)
    while True:
        coming = asyncio.ensure_future(anext(following))
        try:
            while not (await asyncio.wait({coming}, timeout=silence))[0]:
                yield None
            yield coming.result()
        except StopAsyncIteration:
            return
        finally:
            coming.cancel()


@dataclass(frozen=True, slots=True)
class Drawn:
    """A job that is done: its pictures, as files, and what is said about them. The others as in JobResult."""

    job: AnyJob
    images: tuple[bytes, ...]
    report: Mapping[str, Any]
    batches: tuple[int, ...]
    reused_runs: int = 0
    spared_calls: tuple[int, int] = (0, 0)

    def answer(self) -> dict[str, object]:
        """The JSON that a client gets: its pictures in base64, and the report. Its size makes it a thread's work."""
        pictures = [base64.b64encode(picture).decode("ascii") for picture in self.images]
        images: dict[str, object] = {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
        return {**images, **self.report}

    @property
    def drawing(self) -> Job:
        """The job. Raises TypeError for one that drew nothing."""
        if not isinstance(self.job, Job):
            raise TypeError(f"job {self.job.id} has enlarged pictures")
        return self.job

    @property
    def cache_use(self) -> CacheUse:
        """Of the calls that were made for this job."""
        cache = self.report["cache"]
        computed, reused = ((cache.get(name) or 0) for name in ("computed", "reused"))
        return CacheUse(
            model=self.job.model or "none",
            strategy=self.job.strategy.name,
            computed=computed - self.spared_calls[0],
            reused=reused - self.spared_calls[1],
            cache_bytes=cache.get("cache_bytes") or 0,
        )

    @property
    def seconds(self) -> dict[str, float]:
        """In the queue, and from there to the end."""
        timings = self.report["timings"]
        waited = timings["queue_seconds"]
        return {"queue_seconds": waited, "generation_seconds": timings["total_seconds"] - waited}

    def figures(self) -> dict[str, object]:
        """What the log says."""
        cache, timings, use = self.report["cache"], self.report["timings"], self.cache_use
        if not isinstance(self.job, Job):
            seconds = {name: round(timings[name], 3) for name in ("queue_seconds", "total_seconds")}
            return {"upscalers": ",".join(self.job.work.names), "images": len(self.images), **seconds}
        settings = ("interval", "depth", "branch", "threshold")
        return {
            "strategy": use.strategy,
            "model": use.model,
            "computed": use.computed,
            "reused": use.reused,
            "hit_rate": round(use.hit_rate, 2),
            **({"reused_runs": self.reused_runs} if self.reused_runs else {}),
            **{name: cache[name] for name in settings if cache.get(name) is not None},
            "images": len(self.images),
            **{name: getattr(self.job.params, name) for name in ("width", "height", "steps")},
            **{name: round(timings[name], 3) for name in ("queue_seconds", "denoise_seconds", "total_seconds")},
        }


def drawn(job: AnyJob, result: JobResult, *, queue_seconds: float, total_seconds: float) -> Drawn:
    seconds = {"queue_seconds": queue_seconds, **asdict(result.timings), "total_seconds": total_seconds}
    timings = {name: round(value, 4) for name, value in seconds.items()}
    if not isinstance(job, Job):
        return Drawn(job, result.images, {"timings": timings, "cache": {}}, result.batches)
    width, height = result.size or (job.params.width, job.params.height)
    report = {
        "request_id": job.id,
        "model": job.model,
        "seeds": list(job.params.seeds),
        "width": width,
        "height": height,
        "steps": job.params.steps,
        "warnings": list(dict.fromkeys([*job.warnings, *result.warnings])),
        "attention": result.attention,
        "reused_run": result.reused_runs > 0,
        "timings": timings,
        "cache": result.cache,
    }
    job = replace(job, params=job.params.sampled_by(result.sampling))
    return Drawn(job, result.images, report, result.batches, result.reused_runs, result.spared_calls)


@dataclass(slots=True, kw_only=True, eq=False)
class JobRecord:
    """Times are Unix seconds. `owner` is whose job it is: a name of the API key that asked, or the peer's address.

    ephemeral: its request waits for it; nobody asks for it later, and nothing of it is kept. Then `outcome` is what it
        waits for: a Drawn, or the ServiceError that the client is answered with.
    api: by which of the APIs it came, where that matters. handle: the engine's, while it has the job.
    request: the client's body, with the model and the seed that it left open. What makes it too long goes once the job
        is promised, see LEFT_OUT. On disk from the job's end on; sooner where a restart is to take jobs up again.
    key, fingerprint: hashes of the idempotency key and of the body. `saved`: done when the promise is on disk.
    error: what a client that waited would have been answered.
    """

    id: str
    owner: str = ""
    ephemeral: bool = False
    api: str = ""
    model: str | None = None
    state: JobState = JobState.QUEUED
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    step: int = 0
    total: int | None = None
    attempts: int = 0
    error: Mapping[str, Any] | None = None
    request: Mapping[str, Any] | None = None
    key: str | None = None
    fingerprint: str | None = None
    handle: JobHandle | None = field(default=None, repr=False)
    events: EventLog = field(default_factory=EventLog, repr=False)
    future: asyncio.Future[Drawn] | None = field(default=None, repr=False)
    saved: asyncio.Future[None] | None = field(default=None, repr=False)

    @property
    def ended(self) -> bool:
        return self.finished is not None

    @property
    def outcome(self) -> asyncio.Future[Drawn]:
        """What an ephemeral job ends with; fails with the ServiceError that its client is answered with."""
        if self.future is None:
            raise RuntimeError(f"job {self.id} is kept: its result is asked for by its id")
        return self.future

    def end(self, state: JobState, error: Mapping[str, Any] | None = None) -> None:
        if self.ended:
            raise RuntimeError(f"job {self.id} was to end a second time")
        self.state, self.error, self.finished = state, error, time.time()

    def forget_upload(self) -> None:
        if self.request is None:
            return
        kept, left_out = dict(self.request), list(self.request.get(LEFT_OUT, ()))
        sizes = {name: len(pickle.dumps(value)) for name, value in kept.items()}  # quicker than JSON
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            if sum(sizes.values()) <= _LONGEST_REQUEST:
                break
            del kept[name], sizes[name]
            left_out.append(name)
        self.request = kept | ({LEFT_OUT: left_out} if left_out else {})

    def shown(self) -> dict[str, object]:
        """The job as its client sees it, without the result."""
        return {
            "id": self.id,
            "state": self.state.value,
            "model": self.model,
            "position": self.handle.place if self.handle is not None and not self.ended else None,
            "step": self.step,
            "total": self.total,
            "attempts": self.attempts,
            "created": round(self.created, 3),
            "started": round(self.started, 3) if self.started else None,
            "finished": round(self.finished, 3) if self.finished else None,
            "error": self.error,
            "request": self.request,
        }
