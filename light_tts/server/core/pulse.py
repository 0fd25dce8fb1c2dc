"""What a stage process says of itself in shared memory: up to when all is well, and on whose jobs it works.

The supervisor reads it. A process whose time is up hangs and is killed; the jobs that were in work when a
process ended may be the cause.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

INTERVAL = 0.5  # seconds between two beats
ROUND_SECONDS = 2.0  # of the main loop between two rounds, its steps not counted
LOADING_SECONDS = 1800.0  # of a start, compilation of kernels included

_NAMES = 1 << 15  # bytes for the names of jobs; there is room for them twice
_WELL_UNTIL, _PLACE, _WORKED, _HEADER = 0, 1, 2, 24  # words of 64 bits: see PulseReader


class Pulse:
    """A stage's own. A thread writes twice a second the time up to which all is well: now, unless a step
    takes longer than was said before it, or the main loop does not come round. Thread-safe.

    `path`: None where nobody listens.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._map = _open(path)
        self._words = memoryview(self._map)[:_HEADER].cast("Q")
        self._lock = threading.Lock()
        self._main = time.monotonic() + LOADING_SECONDS
        self._steps: dict[int, tuple[tuple[str, ...], float]] = {}
        self._count = 0
        if path is not None:
            threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def tick(self, step_seconds: float = 0.0) -> None:
        """The main loop comes round; its next round may take so much longer than one without a step."""
        self._main = time.monotonic() + ROUND_SECONDS + step_seconds

    def begin(self, jobs: Iterable[str], seconds: float) -> int:
        """A step on these jobs begins, which may take so long -> its number, for `end`."""
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
    def step(self, job: str, pace: Pace, work: float) -> Iterator[None]:
        """A step on one job that takes as long as `work` does at this pace."""
        number, begun = self.begin([job], pace.allowance(work)), time.monotonic()
        try:
            yield
            pace.observe(work, time.monotonic() - begun)
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
        """To the place that is not valid: whoever reads after our death finds nothing half written."""
        jobs = dict.fromkeys(job for names, _ in self._steps.values() for job in names)
        text = "\n".join(jobs).encode()
        if len(text) > _NAMES - 8:
            text = text[: text.rindex(b"\n", 0, _NAMES - 8)]
        place = 1 - self._words[_PLACE]
        start = _HEADER + place * _NAMES
        self._map[start : start + 8 + len(text)] = len(text).to_bytes(8, "little") + text
        self._words[_PLACE] = place


class PulseReader:
    """The view of those who watch a stage process. The words: up to when all is well (nanoseconds of the
    monotonic clock), which of the two places for names is valid, whether a step has ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map = _open(path)
        self._words = memoryview(self._map)[:_HEADER].cast("Q")

    @classmethod
    def create(cls, path: Path) -> PulseReader:
        """The pulse of a process that is about to start: all is well so far."""
        reader = cls(path)
        reader._words[_WELL_UNTIL] = time.monotonic_ns()
        return reader

    def silence(self) -> float:
        """Seconds since all was well."""
        return (time.monotonic_ns() - self._words[_WELL_UNTIL]) / 1e9

    @property
    def worked(self) -> bool:
        """Whether the process has done any work."""
        return bool(self._words[_WORKED])

    def in_work(self) -> list[str]:
        """The jobs that the process works on, or worked on when it ended."""
        start = _HEADER + self._words[_PLACE] * _NAMES
        length = int.from_bytes(self._map[start : start + 8], "little")
        return self._map[start + 8 : start + 8 + length].decode().split("\n") if length else []

    def remove(self) -> None:
        """The process is gone."""
        self._words.release()
        self._map.close()
        self._path.unlink(missing_ok=True)


class Pace:
    """How long work of a kind takes at most, learned from how long it took. Work has any unit; `base`: units
    that stand for what every step costs; `first`: seconds a unit before anything is known."""

    SAFETY = 4.0
    LEAST = 1.0  # seconds

    def __init__(self, first: float, base: float = 64.0) -> None:
        self._seconds_per_unit = first
        self._base = base
        self._known = False

    def allowance(self, work: float) -> float:
        """Seconds in which the work is done for certain, unless something is wrong."""
        return max(self.LEAST, self.SAFETY * self._seconds_per_unit * (work + self._base))

    def observe(self, work: float, seconds: float) -> None:
        """The slowest of late counts."""
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
