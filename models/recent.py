"""Values that were used lately, as many as there is room for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by key, of at most `most_bytes` together, and `entries` of them; the one used longest ago goes first."""

    def __init__(self, most_bytes: int, entries: int | None = None) -> None:
        self._most = most_bytes
        self._entries = entries
        self._kept: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Value | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Keep a value of `size` bytes; one that is larger than all the room is no reason to drop the others."""
        _, before = self._kept.pop(key, (None, 0))
        self.bytes -= before
        if size <= self._most:
            self._kept[key] = value, size
            self.bytes += size
        while self.bytes > self._most or (self._entries is not None and len(self._kept) > self._entries):
            _, (_, dropped) = self._kept.popitem(last=False)
            self.bytes -= dropped
