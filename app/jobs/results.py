"""The answers of finished jobs, as the bytes of their JSON: bounded in size, in memory or in a folder."""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from pathlib import Path

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
