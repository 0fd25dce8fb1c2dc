"""Cached state of voices and streams, within a memory limit."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol


class Sized(Protocol):
    @property
    def bytes(self) -> int: ...


class Memo:
    """Belongs to a voice or a stream; the cached state is freed with it. `content` may be evicted at any
    time, so code that uses it must hold a reference."""

    def __init__(self) -> None:
        self.content: Any = None  # specific to the backend


class MemoLimit:
    """Evicts the least recently used memos while their total exceeds `limit` bytes. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # most recently used last
        self._sizes: weakref.WeakKeyDictionary[Memo, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return sum(list(self._sizes.values()))

    def put(self, memo: Memo, content: Sized | None) -> None:
        """Store `content`, or nothing; also called when it has grown or was used."""
        with self._lock:
            self._sizes.pop(memo, None)
            memo.content = content
            if content is not None:
                self._sizes[memo] = content.bytes
            excess = self.bytes - self.limit
            for other in list(self._sizes):
                if excess <= 0:
                    break
                excess -= self._sizes.pop(other)
                other.content = None
