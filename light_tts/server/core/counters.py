"""What all HTTP workers and the supervisor know together, in small files that each of them maps.

`ActiveRequests`: requests in work, and how much there is to speak. Each worker writes its own slot only, so
there is no lock. Used for admission over all workers and by the supervisor, which drains until the sum is 0
and clears the slot of a dead worker.

`ServiceRate`: how long requests took, as measured by all workers. Two that write at the same time may lose a
measurement, which does no harm.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

SLOTS = 1024


class SharedNumbers:
    """`length` numbers of 8 bytes, all 0 at first, in a file of `directory` (RunDir.shm) that is made by
    whoever comes first. `format`: "q" (integers) or "d" (floats)."""

    def __init__(self, directory: Path, name: str, format: str, length: int) -> None:
        file = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(file, length * 8)
            self._map = mmap.mmap(file, length * 8)
        finally:
            os.close(file)
        self.values = memoryview(self._map).cast(format)

    def close(self) -> None:
        if not self._map.closed:
            self.values.release()
            self._map.close()


class ActiveRequests:
    """`directory`: RunDir.shm."""

    FILE_NAME = "active_requests"

    def __init__(self, directory: Path) -> None:
        self._numbers = SharedNumbers(directory, self.FILE_NAME, "q", 2 * SLOTS)
        self._slots = self._numbers.values[:SLOTS]
        self._work = self._numbers.values[SLOTS:]

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

    def add_work(self, slot: int, milliseconds: int) -> None:
        """So much more audio is to be spoken for this worker; below 0: so much less."""
        self._work[slot] += milliseconds

    def clear(self, slot: int) -> None:
        """The worker of this slot is gone, or has just started."""
        self._slots[slot] = self._work[slot] = 0

    def total(self) -> int:
        return sum(self._slots)

    def work(self) -> int:
        """Milliseconds of audio to be spoken, over all workers."""
        return sum(self._work)

    def close(self) -> None:
        self._slots.release()
        self._work.release()
        self._numbers.close()


class ServiceRate:
    """Seconds that a request takes for each second of audio that was in work when it was accepted, its own
    included. Measured apart for 1 request in work, 2 to 3, 4 to 7 and so on, because a GPU does more at a
    time the more there is to do."""

    FILE_NAME = "service_rate"
    BANDS = 16
    MEMORY = 0.95  # weight of all earlier measurements when one is added
    NO_GAIN = 0.7  # where twice the requests bring less than 1 / NO_GAIN of the work, more bring no more

    def __init__(self, directory: Path) -> None:
        self._numbers = SharedNumbers(directory, self.FILE_NAME, "d", 2 * self.BANDS)
        self._seconds = self._numbers.values[: self.BANDS]  # decaying sums
        self._audio = self._numbers.values[self.BANDS :]

    def observe(self, count: int, audio: float, seconds: float) -> None:
        """A request took `seconds`; when it was accepted, `count` requests were in work with `audio` seconds
        to speak, itself included. More requests are never served more slowly than fewer: that keeps no
        memory of a bad moment that only few would be let in to refute."""
        band = self._band(count)
        self._seconds[band] = self._seconds[band] * self.MEMORY + seconds
        self._audio[band] = self._audio[band] * self.MEMORY + audio
        for higher in range(band + 1, self.BANDS):
            if self._audio[higher] and self._rate(higher) > self._rate(band):
                self._seconds[higher], self._audio[higher] = self._seconds[band], self._audio[band]

    def predict(self, count: int, audio: float) -> float:
        """Seconds until `audio` has been spoken while `count` requests are in work; 0 where nothing is
        known. More requests at a time than ever before are hoped to be served as fast as those, unless it
        was seen that more bring no more."""
        band = self._band(count)
        known = [index for index in range(self.BANDS) if self._audio[index]]
        if not known:
            return 0.0
        nearest = max((index for index in known if index <= band), default=known[0])
        rate = self._rate(nearest)
        if nearest < band and nearest == known[-1]:
            fewer = self._rate(nearest - 1) if nearest - 1 in known else float("inf")
            if rate < self.NO_GAIN * fewer:
                rate /= 2 ** (band - nearest)
        return audio * rate

    def close(self) -> None:
        self._seconds.release()
        self._audio.release()
        self._numbers.close()

    def _rate(self, band: int) -> float:
        return self._seconds[band] / self._audio[band]

    def _band(self, count: int) -> int:
        return min(max(count, 1).bit_length(), self.BANDS) - 1
