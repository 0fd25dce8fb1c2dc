"""Counters shared by all HTTP workers and the supervisor through small memory-mapped files.

`ActiveRequests` counts the active requests and the audio they still have to produce. Each worker writes only
its own slot, so no lock is needed. It is used for admission across all workers, and by the supervisor, which
drains until the sum is 0 and clears the slot of a dead worker.

`ServiceRate` holds service times measured by all workers. Two concurrent writers may lose a measurement,
which is harmless.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

SLOTS = 1024


def map_numbers(path: Path, length: int) -> mmap.mmap:
    """Map `length` 8-byte numbers in a file, created and zeroed by the first process that opens it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, length * 8)
        return mmap.mmap(file, length * 8)
    finally:
        os.close(file)


class ActiveRequests:
    """Number of active requests and outstanding audio of each HTTP worker. `directory`: RunDir.shm."""

    FILE_NAME = "active_requests"

    def __init__(self, directory: Path) -> None:
        self._map = map_numbers(directory / self.FILE_NAME, 2 * SLOTS)
        numbers = memoryview(self._map).cast("q")
        self._slots, self._work = numbers[:SLOTS], numbers[SLOTS:]

    def try_add(self, slot: int, limit: int) -> bool:
        """Count one more request for this worker unless `limit` are already active; return whether it was
        counted. Workers that compete for the last slot may both be refused but never both admitted, because
        each increments its count before checking the sum."""
        self._slots[slot] += 1
        if self.total() <= limit:
            return True
        self._slots[slot] -= 1
        return False

    def remove(self, slot: int) -> None:
        """Count one request fewer for this worker."""
        self._slots[slot] -= 1

    def add_work(self, slot: int, milliseconds: int) -> None:
        """Add to the milliseconds of audio this worker has outstanding; negative values subtract."""
        self._work[slot] += milliseconds

    def clear(self, slot: int) -> None:
        """Reset the slot of a worker that has died or just started."""
        self._slots[slot] = self._work[slot] = 0

    def total(self) -> int:
        return sum(self._slots)

    def work(self) -> int:
        """Return the outstanding audio of all workers in milliseconds."""
        return sum(self._work)

    def close(self) -> None:
        self._slots.release()
        self._work.release()
        self._map.close()


class ServiceRate:
    """Estimated service time: seconds per second of audio that was outstanding when a request was accepted,
    its own included. Measured separately for 1 active request, 2 to 3, 4 to 7 and so on, because a GPU has
    higher throughput at higher load."""

    FILE_NAME = "service_rate"
    BANDS = 16
    MEMORY = 0.95  # weight of the earlier measurements when one is added
    # if doubling the load raises throughput by less than 1 / LITTLE_GAIN, more load is assumed to double it
    # at most once more
    LITTLE_GAIN = 0.7

    def __init__(self, directory: Path) -> None:
        self._map = map_numbers(directory / self.FILE_NAME, 2 * self.BANDS)
        numbers = memoryview(self._map).cast("d")
        # exponentially decaying sums
        self._seconds, self._audio = numbers[: self.BANDS], numbers[self.BANDS :]

    def observe(self, count: int, audio: float, seconds: float) -> None:
        """Record that a request took `seconds`, and that `count` requests with `audio` seconds outstanding
        were active when it was accepted, itself included. Higher load never has a lower rate than lower load,
        so one slow measurement is corrected even if few requests are admitted afterwards."""
        band = self._band(count)
        self._seconds[band] = self._seconds[band] * self.MEMORY + seconds
        self._audio[band] = self._audio[band] * self.MEMORY + audio
        for higher in range(band + 1, self.BANDS):
            if self._audio[higher] and self._rate(higher) > self._rate(band):
                self._seconds[higher], self._audio[higher] = self._seconds[band], self._audio[band]

    def predict(self, count: int, audio: float) -> float:
        """Return the estimated seconds to produce `audio` seconds with `count` active requests; 0 if nothing
        has been measured. For a load never seen before, the rate is extrapolated from the highest load seen,
        in favour of the request: if it is accepted, the rate will be known."""
        band = self._band(count)
        known = [index for index in range(self.BANDS) if self._audio[index]]
        if not known:
            return 0.0
        nearest = max((index for index in known if index <= band), default=known[0])
        rate = self._rate(nearest)
        if nearest < band and nearest == known[-1]:
            fewer = self._rate(nearest - 1) if nearest - 1 in known else float("inf")
            doublings = band - nearest if rate < self.LITTLE_GAIN * fewer else 1
            rate /= 2**doublings
        return audio * rate

    def close(self) -> None:
        self._seconds.release()
        self._audio.release()
        self._map.close()

    def _rate(self, band: int) -> float:
        return self._seconds[band] / self._audio[band]

    def _band(self, count: int) -> int:
        return min(max(count, 1).bit_length(), self.BANDS) - 1
