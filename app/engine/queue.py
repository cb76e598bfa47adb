"""The jobs that wait for a worker: the oldest goes first, whatever happened to it before."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from app.engine.base import JobHandle


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

    def take(self) -> JobHandle:
        """The oldest. Raises IndexError when none waits."""
        handle = self._handles.pop(0)
        self._tell()
        return handle

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
