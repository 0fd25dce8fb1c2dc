"""When the language model leaves the GPU to first chunks. Pure, but for what it is given to ask."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST = 0.15  # seconds without a step at a time
ON_ITS_WAY = 0.005  # seconds in which a decode process surely has the tokens and has begun with them


class LLMYield:
    """While a client hears nothing yet and the tokens for it are there, all the GPU is for its first chunk:
    the flow is thousands of small kernels one after the other, and each step begun beside it holds these up.

    Steps are held back for `LONGEST` at a time, and for half of the time where first chunks follow one
    another without end: time without a step is paid for with time in which steps could be begun.
    `taken`: whether a decode process has such a chunk.
    """

    def __init__(self, taken: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._taken = taken
        self._clock = clock
        self._expected_until = 0.0
        self._holding = False
        self._credit = LONGEST
        self._asked = clock()

    def expect(self) -> None:
        """The tokens of a first chunk have gone to a decode process."""
        self._expected_until = self._clock() + ON_ITS_WAY

    def holds(self, urgent: bool, coming: bool) -> bool:
        """Whether to begin no step now; to be asked before each step and before each sleep. `urgent`: one is
        needed at once, or there is none to hold back; `coming`: the last tokens of a first chunk are being
        drawn."""
        now = self._clock()
        passed, self._asked = now - self._asked, now
        self._credit = min(LONGEST, self._credit + (-passed if self._holding else passed))
        wanted = not urgent and (coming or now < self._expected_until or self._taken())
        self._holding = wanted and self._credit > 0
        return self._holding
