"""Turns on a GPU that several LLM processes share."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class GpuTurn:
    """At most one of the processes that use the same directory has the turn, for `steps` steps if another
    wants it.

    Two file locks: who wants the turn first takes the queue's lock, and gives it up only with the turn in
    hand. So a process that gives up the turn and wants it back comes after one that is waiting. The kernel
    frees the locks of a process that dies.
    """

    def __init__(self, directory: Path, steps: int) -> None:
        self._steps = steps
        self._left = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._queue = os.open(directory / "llm-queue.lock", flags, 0o600)
        self._turn = os.open(directory / "llm-turn.lock", flags, 0o600)

    def take(self) -> None:
        """Have the turn for one more step; sleeps until it is there."""
        if self._left == 0:
            self.release()
            fcntl.flock(self._queue, fcntl.LOCK_EX)
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            fcntl.flock(self._queue, fcntl.LOCK_UN)
            self._left = self._steps
        self._left -= 1

    def release(self) -> None:
        """Let another process have the turn (call before sleeping)."""
        fcntl.flock(self._turn, fcntl.LOCK_UN)
        self._left = 0

    def close(self) -> None:
        if self._queue >= 0:
            os.close(self._turn)
            os.close(self._queue)
            self._queue = self._turn = -1
