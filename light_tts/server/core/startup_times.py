"""Measures the phases of a process's start."""

from __future__ import annotations

import time
from collections.abc import Callable


class StartupTimes:
    """The duration of each phase, from the creation of this object on. As text: `imports 2.1 s, ...`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self._phases: list[str] = []

    def end(self, phase: str) -> None:
        """End the current phase, which is called `phase`, and begin the next."""
        now = self._clock()
        self._phases.append(f"{phase} {now - self._begun:.1f} s")
        self._begun = now

    def __str__(self) -> str:
        return ", ".join(self._phases)
