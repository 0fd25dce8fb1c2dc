"""Records CUDA graphs while a stage process has nothing to do."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from light_tts.server.core.heartbeat import INTERVAL, Heartbeat

QUIET_SECONDS = 0.1  # time without work after which a process records
LONGEST_RECORDING = 10.0  # seconds; usually less than a tenth of one
POLL_SECONDS = 0.05  # seconds between attempts while it may not record yet


class Recording(Protocol):
    @property
    def recorded(self) -> int:
        """Number of graphs."""

    @property
    def unrecorded(self) -> int:
        """Number of graphs that can still be recorded."""

    def record_next(self) -> None:
        """Record one of them."""


class IdleRecorder:
    """Records the graphs of `engine` one at a time while the stage is idle. Messages are read between two of
    them, and only one process of the server records at a time, so a request waits for at most one.

    `path`: of a file lock shared by the stage processes. It is kept until the next `step`: by then a request
    that arrived in the meantime has been passed on, and the process after this one is no longer idle. The
    kernel releases the lock of a process that dies.
    """

    def __init__(
        self,
        engine: Recording,
        path: Path,
        heartbeat: Heartbeat,
        log: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._path = path
        self._heartbeat = heartbeat
        self._log = log
        self._clock = clock
        self._file = -1
        self._has_turn = False
        self._quiet_until = clock()
        self._seconds = 0.0
        self._count = 0
        if engine.unrecorded:
            log.info("%d CUDA graphs are recorded, %d follow while idle", engine.recorded, engine.unrecorded)

    def patience(self) -> float:
        """Return the seconds an idle stage should wait for messages."""
        if self._has_turn:
            return 0.0
        return POLL_SECONDS if self._engine.unrecorded else INTERVAL

    def step(self, idle: bool) -> None:
        """Record one graph if possible. Call after messages have been handled; `idle`: there is no job."""
        now = self._clock()
        if not idle:
            self._quiet_until = now + QUIET_SECONDS
        if not idle or not self._engine.unrecorded:
            self._give_up_turn()
            return
        if now < self._quiet_until or not self._take_turn():
            return
        self._heartbeat.tick(LONGEST_RECORDING)
        self._engine.record_next()
        self._count += 1
        self._seconds += self._clock() - now
        if not self._engine.unrecorded:
            self._log.info("recorded %d CUDA graphs in %.1f s while idle", self._count, self._seconds)
            self._count, self._seconds = 0, 0.0

    def _take_turn(self) -> bool:
        if self._file < 0:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._has_turn:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._has_turn = True
        return True

    def _give_up_turn(self) -> None:
        if self._has_turn:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._has_turn = False

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._has_turn = False
