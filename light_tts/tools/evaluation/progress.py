"""How far a run is, on standard error."""

from __future__ import annotations

import sys
import time

SILENCE = 10.0  # seconds between lines where the output is no terminal


class Progress:
    """A line that is written over on a terminal, and a line now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._terminal = sys.stderr.isatty()
        self._shown = time.monotonic()

    def show(self, title: str, done: int, rest: str) -> None:
        now, last = time.monotonic(), done == self._total
        text = f"{title} {done} of {self._total}{rest}"
        if self._terminal:
            print(f"\r\x1b[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or now - self._shown >= SILENCE:
            self._shown = now
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        print(f"\r\x1b[K{text}" if self._terminal else text, file=sys.stderr, flush=True)
