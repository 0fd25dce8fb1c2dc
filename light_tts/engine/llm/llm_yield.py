"""Decides when the language model leaves the GPU to first chunks. Pure except for the callables it is
given.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from light_tts.engine.llm.credit import Credit

LONGEST = 0.15  # maximum seconds without a step
# seconds after which a decode process has certainly received the tokens and started on them
HANDOVER_SECONDS = 0.005


class LLMYield:
    """Holds back LLM steps while a client still waits for its first chunk and the tokens for it exist. The
    flow consists of thousands of small sequential kernels, and every concurrent step delays them.

    Steps are held back for at most `LONGEST` at a time, and at most half of the time if first chunks follow
    one another without pause: time without steps must be balanced by time with steps. `taken`: whether a
    decode process has a first chunk.
    """

    def __init__(self, taken: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._taken = taken
        self._clock = clock
        self._expected_until = 0.0
        self._credit = Credit(LONGEST, 1.0, clock)

    def expect(self) -> None:
        """Record that the tokens of a first chunk have been sent to a decode process."""
        self._expected_until = self._clock() + HANDOVER_SECONDS

    def holds(self, urgent: bool, coming: bool) -> bool:
        """Return whether to hold back steps now; call before each step and each sleep. `urgent`: a step is
        needed at once, or there is none to hold back; `coming`: the last tokens of a first chunk are being
        sampled."""
        expected = self._clock() < self._expected_until
        return self._credit.holds(not urgent and (coming or expected or self._taken()))
