"""Progress output on standard error."""

from __future__ import annotations

import sys
import time

SILENCE = 10.0  # seconds between lines if the output is not a terminal


class EvaluationProgress:
    """A line that is overwritten on a terminal, and occasional lines elsewhere."""

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
        """Print a permanent line."""
        print(f"\r\x1b[K{text}" if self._terminal else text, file=sys.stderr, flush=True)
