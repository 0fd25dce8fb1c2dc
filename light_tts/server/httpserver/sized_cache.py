"""LRU cache limited by the size of its values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class SizedCache(Generic[Key, Value]):
    """Keeps the most recently used values, `limit` bytes of them at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Key, tuple[Value, int]] = OrderedDict()  # least recently used first
        self._bytes = 0

    def get(self, key: Key) -> Value | None:
        """Return the value of `key`, or None; it is now the most recently used."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        return kept[0]

    def keep(self, key: Key, value: Value, size: int) -> None:
        """Add or replace a value of `size` bytes."""
        self.forget(key)
        self._kept[key] = value, size
        self._bytes += size
        while self._bytes > self._limit:
            self.forget(next(iter(self._kept)))

    def forget(self, key: Key) -> None:
        """Drop the value of `key`, if there is one."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._bytes -= kept[1]
