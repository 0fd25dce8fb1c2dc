"""What somebody would have heard who listened to a stream while it came."""

from __future__ import annotations


class Listener:
    """An imagined player that starts with the first piece and plays in real time.

    `underruns`: how often it ran dry before the end. `silence`: seconds of silence in all, which is also the
    buffer that would have avoided them: so much later it should have started."""

    def __init__(self) -> None:
        self.underruns = 0
        self.silence = 0.0
        self._dry: float | None = None  # when all that has come has been played

    def hear(self, now: float, seconds: float) -> None:
        """So many seconds of audio are on their way to it; `now` on any clock in seconds."""
        if self._dry is None:
            self._dry = now
        elif now > self._dry:
            self.underruns += 1
            self.silence += now - self._dry
            self._dry = now
        self._dry += seconds
