"""Heartbeat of a stage process in shared memory: the time until which it is known to be healthy, and its
jobs.

The supervisor reads it. A process whose deadline has passed is considered hung and killed. The jobs it was
processing when it ended may be the cause.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

INTERVAL = 0.5  # seconds between two heartbeats
ROUND_SECONDS = 2.0  # longest iteration of the main loop, not counting steps
LOADING_SECONDS = 1800.0  # longest start, including kernel compilation

_NAMES = 1 << 15  # bytes per buffer of job names; there are two buffers
# indices of 64-bit words (see HeartbeatReader); header size in bytes
_WELL_UNTIL, _ACTIVE, _WORKED, _HEADER = 0, 1, 2, 24


class Heartbeat:
    """Writes the heartbeat of this process. Twice a second a thread writes the current time, or the earliest
    deadline that has passed, be it of a running step or of the main loop. Thread-safe.

    `path`: None if nobody reads it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._map = _open(path)
        self._words = memoryview(self._map)[:_HEADER].cast("Q")
        self._lock = threading.Lock()
        self._main = time.monotonic() + LOADING_SECONDS
        self._steps: dict[int, tuple[tuple[str, ...], float]] = {}
        self._count = 0
        if path is not None:
            threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def tick(self, step_seconds: float = 0.0) -> None:
        """Record an iteration of the main loop; the next one may take `step_seconds` longer than one without
        a step."""
        self._main = time.monotonic() + ROUND_SECONDS + step_seconds

    def begin(self, jobs: Iterable[str], seconds: float) -> int:
        """Record the start of a step on these jobs that may take `seconds`; return its number for `end`."""
        with self._lock:
            self._count += 1
            self._steps[self._count] = (tuple(jobs), time.monotonic() + seconds)
            self._write_names()
            return self._count

    def end(self, step: int) -> None:
        with self._lock:
            del self._steps[step]
            self._words[_WORKED] = 1
            self._write_names()

    @contextlib.contextmanager
    def step(self, job: str, bound: DurationBound, work: float) -> Iterator[None]:
        """Context manager for a step on one job. It may take `bound.allowance(work)`; its duration updates
        the bound."""
        number, begun = self.begin([job], bound.allowance(work)), time.monotonic()
        try:
            yield
            bound.observe(work, time.monotonic() - begun)
        finally:
            self.end(number)

    def _run(self) -> None:
        while True:
            with self._lock:
                limits = [limit for _, limit in self._steps.values()]
            well_until = min([time.monotonic(), self._main, *limits])
            self._words[_WELL_UNTIL] = int(well_until * 1e9)
            time.sleep(INTERVAL)

    def _write_names(self) -> None:
        """Write the job names to the inactive buffer, then activate it: if this process dies while writing,
        readers see the previous names."""
        jobs = dict.fromkeys(job for names, _ in self._steps.values() for job in names)
        text = "\n".join(jobs).encode()
        if len(text) > _NAMES - 8:
            text = text[: text.rindex(b"\n", 0, _NAMES - 8)]
        inactive = 1 - self._words[_ACTIVE]
        start = _HEADER + inactive * _NAMES
        self._map[start : start + 8 + len(text)] = len(text).to_bytes(8, "little") + text
        self._words[_ACTIVE] = inactive


class HeartbeatReader:
    """Reads a heartbeat. Header words: time until which the process was healthy (nanoseconds of the monotonic
    clock), index of the active name buffer, whether any step has finished."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map = _open(path)
        self._words = memoryview(self._map)[:_HEADER].cast("Q")

    @classmethod
    def create(cls, path: Path) -> HeartbeatReader:
        """Create the heartbeat of a process that is about to start, healthy as of now."""
        reader = cls(path)
        reader._words[_WELL_UNTIL] = time.monotonic_ns()
        return reader

    def silence(self) -> float:
        """Return the seconds since the process was last known to be healthy."""
        return (time.monotonic_ns() - self._words[_WELL_UNTIL]) / 1e9

    @property
    def worked(self) -> bool:
        """Whether the process has finished any step."""
        return bool(self._words[_WORKED])

    def in_work(self) -> list[str]:
        """Return the jobs that the process is working on, or was when it ended."""
        start = _HEADER + self._words[_ACTIVE] * _NAMES
        length = int.from_bytes(self._map[start : start + 8], "little")
        return self._map[start + 8 : start + 8 + length].decode().split("\n") if length else []

    def remove(self) -> None:
        """Delete the file of a process that is gone."""
        self._words.release()
        self._map.close()
        self._path.unlink(missing_ok=True)


class DurationBound:
    """Upper bound on the duration of one kind of work, learned from measured durations. Work may have any
    unit; `base`: fixed cost of every step in that unit; `first`: initial estimate in seconds per unit."""

    SAFETY = 4.0
    LEAST = 1.0  # seconds

    def __init__(self, first: float, base: float = 64.0) -> None:
        self._seconds_per_unit = first
        self._base = base
        self._known = False

    def allowance(self, work: float) -> float:
        """Return the seconds after which the work is overdue."""
        return max(self.LEAST, self.SAFETY * self._seconds_per_unit * (work + self._base))

    def observe(self, work: float, seconds: float) -> None:
        """Update the estimate with a measured duration. The maximum decays slowly, so recent slow steps
        dominate."""
        found = seconds / (work + self._base)
        self._seconds_per_unit = max(found, 0.9 * self._seconds_per_unit) if self._known else found
        self._known = True


def _open(path: Path | None) -> mmap.mmap:
    size = _HEADER + 2 * _NAMES
    if path is None:
        return mmap.mmap(-1, size)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, size)
        return mmap.mmap(file, size)
    finally:
        os.close(file)
