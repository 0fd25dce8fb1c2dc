"""Measures the phases of a process's start."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST = 0.05  # seconds; shorter phases are not shown


class StartupTimes:
    """The duration of each phase, from the creation of this object on. As text: `imports 2.1 s, ...`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self._seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """End the current phase, which is called `phase`, and begin the next. Those of one name are added."""
        now = self._clock()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._begun
        self._begun = now

    def __str__(self) -> str:
        shown = (f"{phase} {s:.1f} s" for phase, s in self._seconds.items() if s >= SHORTEST)
        return ", ".join(shown)
