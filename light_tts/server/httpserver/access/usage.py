"""Usage of each API key over all HTTP workers, in one small memory-mapped file.

Each worker writes only its own slot, so no lock is needed; a key's usage is the sum over the slots.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from light_tts.server.core.counters import SLOTS, map_numbers

MINUTE = 60.0
# minute, requests in it, requests in the minute before, active requests
_PRESENT, _COUNT, _BEFORE, _OPEN = range(4)


class KeyUsage:
    """Request counts per API key. `slot`: this worker's, see core.counters."""

    FILE_NAME = "key_usage"

    def __init__(self, directory: Path, keys: int, slot: int) -> None:
        numbers = map_numbers(directory / self.FILE_NAME, keys * SLOTS * 4)
        self._table = np.frombuffer(numbers, np.int64).reshape(keys, SLOTS, 4)
        self._slot = slot
        self._table[:, slot] = 0

    def open_requests(self, key: int) -> int:
        return int(self._table[key, :, _OPEN].sum())

    def rate(self, key: int, now: float) -> float:
        """Return the number of requests in the 60 s before `now`, assuming that those of the previous minute
        were spread evenly."""
        minute, passed = divmod(now, MINUTE)
        present, count, before = self._table[key, :, :3].T
        this = count[present == minute].sum()
        last = before[present == minute].sum() + count[present == minute - 1].sum()
        return float(this + last * (1 - passed / MINUTE))

    def begin(self, key: int, now: float | None = None) -> None:
        """Count one more active request until `end` is called."""
        minute = int((time.time() if now is None else now) // MINUTE)
        mine = self._table[key, self._slot]
        if mine[_PRESENT] != minute:
            mine[_BEFORE] = mine[_COUNT] if mine[_PRESENT] == minute - 1 else 0
            mine[_COUNT] = 0
            mine[_PRESENT] = minute
        mine[_COUNT] += 1
        mine[_OPEN] += 1

    def end(self, key: int) -> None:
        self._table[key, self._slot, _OPEN] -= 1
