"""Time slicing of a GPU shared by several LLM processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


class GpuTurn:
    """Grants the GPU to one of the processes that use the same directory, for about `steps` steps if another
    one is waiting. `finish`: called before the turn is given up, to wait for queued work.

    Uses two file locks. A process that wants the turn first takes the queue lock and holds it until it has
    the turn lock. So a process that gives up the turn and wants it back queues behind one that is already
    waiting. The kernel releases the locks of a process that dies.
    """

    def __init__(self, directory: Path, steps: int, finish: Callable[[], None] = lambda: None) -> None:
        self._steps = steps
        self._finish = finish
        self._left = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._queue = os.open(directory / "llm-queue.lock", flags, 0o600)
        self._turn = os.open(directory / "llm-turn.lock", flags, 0o600)

    def take(self, steps: int = 1) -> None:
        """Acquire the GPU for `steps` more steps; blocks until it is available."""
        if self._left <= 0:
            self.release()
            fcntl.flock(self._queue, fcntl.LOCK_EX)
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            fcntl.flock(self._queue, fcntl.LOCK_UN)
            self._left = self._steps
        self._left -= steps

    def release(self) -> None:
        """Let another process use the GPU (call before sleeping)."""
        self._finish()
        fcntl.flock(self._turn, fcntl.LOCK_UN)
        self._left = 0

    def close(self) -> None:
        if self._queue >= 0:
            os.close(self._turn)
            os.close(self._queue)
            self._queue = self._turn = -1
