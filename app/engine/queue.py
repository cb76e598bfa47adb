"""The jobs that wait for a worker, by their age, and which of them are drawn together."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from app.engine.types import AnyJob, JobHandle, UpscaleJob

QUIET = 1 / 8  # of the timeout: a worker that waits for company gives up when so long nobody came


class JobQueue:
    """Ordered by age, so that no job can be overtaken for ever: one that comes back from a lost worker finds its place.

    Each handle learns its place, 1 for the next one, whenever it changes.
    """

    def __init__(self) -> None:
        self._handles: list[JobHandle] = []

    def __len__(self) -> int:
        return len(self._handles)

    def __iter__(self) -> Iterator[JobHandle]:
        return iter(tuple(self._handles))

    def put(self, handle: JobHandle) -> None:
        insort(self._handles, handle, key=lambda other: other.age)
        self._tell()

    def take(self, handles: Sequence[JobHandle]) -> None:
        """Remove these. Raises ValueError for one that does not wait."""
        for handle in handles:
            self._handles.remove(handle)
        self._tell()

    def remove(self, handle: JobHandle) -> bool:
        """False: it is not waiting."""
        if handle not in self._handles:
            return False
        self._handles.remove(handle)
        self._tell()
        return True

    def _tell(self) -> None:
        for place, handle in enumerate(self, start=1):
            handle.stand(place)


def kind_of(job: AnyJob) -> Hashable | None:
    """Jobs of one kind can be drawn together: they differ in prompts and seeds alone. None: it is drawn by itself.

    So are jobs of several batches, pictures that are drawn over or steer (no two requests bring the same), passes that
    look at what was drawn, previews, and compiled layers, which each size of a batch would compile anew.
    """
    if isinstance(job, UpscaleJob):
        return None
    params = job.params
    alone = params.img2img is not None or params.control or params.adetailer or params.preview or params.compiled
    if alone or len(params.seeds) > params.batch_size:
        return None
    alike = replace(params, prompt="", negative_prompt="", seeds=(), batch_size=1, owner=None)
    kind = (job.model, job.strategy, alike)
    try:
        hash(kind)
    except TypeError:
        return None  # there is a picture in it
    return kind


@dataclass(slots=True)
class _Traffic:
    """What was seen of a kind: `most` images on their way at once since its last start, times of the clock."""

    most: int
    arrived: float
    ended: float = 0.0

    @property
    def seen(self) -> float:
        return max(self.arrived, self.ended)


class Grouping:
    """Groups of at most `most` images. `timeout`: seconds that a free worker waits at most for a group to fill.

    It waits while company is likely: as long as fewer images of the kind wait than were on their way at once a moment
    ago, nobody else waits, no other worker is idle, and somebody came or was answered within an eighth of the timeout.
    So those who ask again as soon as they are answered find each other, and one who is alone never waits.
    """

    def __init__(self, most: int, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._timeout = timeout
        self._clock = clock
        self._traffic: dict[Hashable, _Traffic] = {}
        self._waiting: tuple[Hashable, float] | None = None  # the kind that a worker waits for, and since when

    def arrived(self, handle: JobHandle, waiting: Iterable[JobHandle], running: Iterable[JobHandle]) -> None:
        """A job was accepted; it is among those `waiting` already."""
        if handle.kind is None:
            return
        now, all_handles = self._clock(), [*waiting, *running]
        known = {other.kind for other in all_handles if other is not handle}
        for kind, seen in [(kind, one.seen) for kind, one in self._traffic.items()]:
            if kind not in known and now - seen > self._timeout:
                del self._traffic[kind]
        traffic = self._traffic.setdefault(handle.kind, _Traffic(0, now))
        traffic.most = max(traffic.most, _images(_of_kind(handle.kind, all_handles)))
        traffic.arrived = now

    def ended(self, handle: JobHandle) -> None:
        """A job has left its worker."""
        if handle.kind in self._traffic:
            self._traffic[handle.kind].ended = self._clock()

    def choose(
        self,
        waiting: Sequence[JobHandle],
        running: Sequence[JobHandle],
        finishing: Sequence[JobHandle] = (),
        *,
        idle: int = 0,
        hurry: bool = False,
    ) -> tuple[list[JobHandle], float]:
        """The jobs to start now, the oldest first; or none, and seconds after which to ask again at the latest.

        waiting: not empty, by age. running: being drawn. finishing: drawn, and not answered yet.
        idle: how many other workers could start something as well. hurry: do not wait.
        """
        oldest = waiting[0]
        kind = oldest.kind
        if kind is None or oldest.attempts:  # one that a worker was lost with is tried alone
            return [oldest], 0.0
        alike = [handle for handle in _of_kind(kind, waiting) if not handle.attempts]
        room = min(self._most, -(-_images(alike) // (idle + 1)))  # several workers share what there is
        group = [oldest]
        for handle in alike[1:]:
            if _images([*group, handle]) <= room:
                group.append(handle)
        if len(group) == len(waiting) and not idle and not hurry:
            others = _images(_of_kind(kind, running))
            seconds = self._patience(kind, _images(group), others, is_finishing=bool(_of_kind(kind, finishing)))
            if seconds > 0:
                return [], seconds
        self._waiting = None
        if kind in self._traffic:
            self._traffic[kind].most = _images(_of_kind(kind, [*waiting, *running, *finishing]))
        return group, 0.0

    def _patience(self, kind: Hashable, images: int, running: int, *, is_finishing: bool) -> float:
        """Seconds to wait for others of this kind."""
        traffic = self._traffic.get(kind)
        if traffic is None or images >= min(self._most, traffic.most - running):
            return 0.0
        now = self._clock()
        if self._waiting is None or self._waiting[0] != kind:
            self._waiting = kind, now
        since = self._waiting[1]
        heard = now if is_finishing else max(since, traffic.arrived, traffic.ended)  # who is answered may come again
        return min(since + self._timeout, heard + QUIET * self._timeout) - now


def _of_kind(kind: Hashable, handles: Iterable[JobHandle]) -> list[JobHandle]:
    return [handle for handle in handles if handle.kind == kind]


def _images(handles: Iterable[JobHandle]) -> int:
    return sum(handle.job.images for handle in handles)
