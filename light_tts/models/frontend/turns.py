"""Fair scheduling of many texts over few workers."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class Turns:
    """Grants `places` turns at a time. Of the waiting texts, the one that has had the fewest turns is next,
    then the one that arrived first, so a short text overtakes a long one."""

    def __init__(self, places: int) -> None:
        self._lock = threading.Lock()
        self._free = places
        self._waiting: list[tuple[int, int, threading.Event]] = []
        self._arrivals = count()

    @contextmanager
    def turn(self, had: int) -> Iterator[None]:
        """Context manager that waits for a place and holds it; `had` is the number of turns the text has
        already had."""
        self._take(had)
        try:
            yield
        finally:
            self._give_back()

    def _take(self, had: int) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            called = threading.Event()
            heapq.heappush(self._waiting, (had, next(self._arrivals), called))
        called.wait()

    def _give_back(self) -> None:
        with self._lock:
            if self._waiting:
                heapq.heappop(self._waiting)[2].set()
            else:
                self._free += 1
