"""The jobs that wait for a worker, in the order of their age, whatever happened to them before."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence

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
