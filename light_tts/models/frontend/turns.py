"""Who may work next, where many texts wait for few workers."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class Turns:
    """`places` workers, each for one turn at a time. Of those who wait, the one that has had the fewest turns
    is next, and of these the one that came first: so a short text passes a long one in the middle of it."""

    def __init__(self, places: int) -> None:
        self._lock = threading.Lock()
        self._free = places
        self._waiting: list[tuple[int, int, threading.Event]] = []
        self._arrivals = count()

    @contextmanager
    def turn(self, had: int) -> Iterator[None]:
        """Wait for a place and have it inside `with`; `had` is how many turns the same text has had."""
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
