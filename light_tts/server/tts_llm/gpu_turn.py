"""Turns on a GPU that several LLM processes share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


class GpuTurn:
    """At most one of the processes that use the same directory has the turn, for about `steps` steps if
    another wants it. `finish`: called before the turn is given up, to wait for work that is still queued.

    Two file locks: who wants the turn first takes the queue's lock, and gives it up only with the turn in
    hand. So a process that gives up the turn and wants it back comes after one that is waiting. The kernel
    frees the locks of a process that dies.
    """

    def __init__(self, directory: Path, steps: int, finish: Callable[[], None] = lambda: None) -> None:
        self._steps = steps
        self._finish = finish
        self._left = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._queue = os.open(directory / "llm-queue.lock", flags, 0o600)
        self._turn = os.open(directory / "llm-turn.lock", flags, 0o600)

    def take(self, steps: int = 1) -> None:
        """Have the turn for `steps` more steps; sleeps until it is there."""
        if self._left <= 0:
            self.release()
            fcntl.flock(self._queue, fcntl.LOCK_EX)
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            fcntl.flock(self._queue, fcntl.LOCK_UN)
            self._left = self._steps
        self._left -= steps

    def release(self) -> None:
        """Let another process have the turn (call before sleeping)."""
        self._finish()
        fcntl.flock(self._turn, fcntl.LOCK_UN)
        self._left = 0

    def close(self) -> None:
        if self._queue >= 0:
            os.close(self._turn)
            os.close(self._queue)
            self._queue = self._turn = -1
