"""Simulates a listener's player to measure the underruns of a stream."""

from __future__ import annotations


class Listener:
    """A simulated player that starts with the first chunk and plays in real time.

    `underruns`: how often it ran out of audio before the end. `silence`: total seconds of silence caused by
    underruns, which equals the initial buffering that would have avoided them.
    """

    def __init__(self) -> None:
        self.underruns = 0
        self.silence = 0.0
        self._dry: float | None = None  # time at which all received audio has been played

    def hear(self, now: float, seconds: float) -> None:
        """Add `seconds` of audio sent at time `now` (any clock, in seconds)."""
        if self._dry is None:
            self._dry = now
        elif now > self._dry:
            self.underruns += 1
            self.silence += now - self._dry
            self._dry = now
        self._dry += seconds
