"""What a backend keeps of voices and streams in order not to compute it again, within a limit of bytes."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol


class Sized(Protocol):
    @property
    def bytes(self) -> int: ...


class Memo:
    """Belongs to a voice or a stream, and what is kept of it ends with it. `content` may vanish at any time:
    whoever needs it holds it."""

    def __init__(self) -> None:
        self.content: Any = None  # the backend's own


class MemoLimit:
    """Empties the memos used longest ago where all together become more than `limit` bytes. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._sizes: weakref.WeakKeyDictionary[Memo, int] = weakref.WeakKeyDictionary()  # last used last
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        return sum(list(self._sizes.values()))

    def put(self, memo: Memo, content: Sized | None) -> None:
        """Keep this, or nothing; also to say that it has grown or was used."""
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
