"""How many requests are active in each HTTP worker: one small file that all workers and the supervisor map.

Each worker writes its own slot only, so there is no lock. Used for the limit over all workers (429) and by
the supervisor, which drains until the sum is 0 and clears the slot of a dead worker.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

SLOTS = 1024


class ActiveRequests:
    """`directory`: RunDir.shm; the file is made by whoever comes first."""

    FILE_NAME = "active_requests"

    def __init__(self, directory: Path) -> None:
        file = os.open(directory / self.FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, SLOTS * 8)
            self._map = mmap.mmap(file, SLOTS * 8)
        finally:
            os.close(file)
        self._slots = memoryview(self._map).cast("q")

    def try_add(self, slot: int, limit: int) -> bool:
        """Count one more request of this worker unless `limit` are active already. Workers that compete for
        the last place may both be refused, but never both be let in: each counts itself before it looks."""
        self._slots[slot] += 1
        if self.total() <= limit:
            return True
        self._slots[slot] -= 1
        return False

    def remove(self, slot: int) -> None:
        """One request of this worker has ended."""
        self._slots[slot] -= 1

    def clear(self, slot: int) -> None:
        """The worker of this slot is gone, or has just started."""
        self._slots[slot] = 0

    def total(self) -> int:
        return sum(self._slots)

    def close(self) -> None:
        if not self._map.closed:
            self._slots.release()
            self._map.close()
