"""Bounds how long some work is held back for other work. Pure except for the clock it is given."""

from __future__ import annotations

import time
from collections.abc import Callable


class Credit:
    """Seconds for which work may still be held back: at most `longest`; each second without holding it back
    adds `regained`."""

    def __init__(self, longest: float, regained: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest = longest
        self._regained = regained
        self._clock = clock
        self._left = longest
        self._holding = False
        self._asked = clock()

    def holds(self, wanted: bool) -> bool:
        """Return whether to hold the work back now, given that this is `wanted`; it lasts until the next
        call."""
        now = self._clock()
        passed, self._asked = now - self._asked, now
        self._left = min(self._longest, self._left + (-passed if self._holding else self._regained * passed))
        self._holding = wanted and self._left > 0
        return self._holding
