"""Priority for first chunks on a shared GPU: a decode process signals the others that it has one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class FirstChunkLock:
    """File lock taken by decode processes and only tested by the LLM process. The kernel releases the lock of
    a process that dies."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._kept = False

    def keep(self, wanted: bool) -> None:
        """Take the lock if `wanted`, else release it. Does nothing if that is the state already."""
        if wanted != self._kept:
            fcntl.flock(self._file, fcntl.LOCK_SH if wanted else fcntl.LOCK_UN)
            self._kept = wanted

    def taken(self) -> bool:
        """Return whether another process holds the lock."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)  # release at once: this was only a test
        return False

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def choose_first_chunk_lock(directory: Path, device: torch.device) -> FirstChunkLock | None:
    """Return the lock for this GPU, or None on a CPU, where the operating system schedules the cores."""
    if device.type != "cuda":
        return None
    return FirstChunkLock(directory / f"first-chunks-{device.index}.lock")
