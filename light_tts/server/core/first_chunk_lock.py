"""First chunks go first on a GPU: how a decode process tells the others that it has such a chunk."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class FirstChunkLock:
    """A file lock that decode processes share and that the language model only looks at. The kernel frees the
    lock of a process that dies."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._kept = False

    def keep(self, wanted: bool) -> None:
        """Take it, unless this process has it; or leave it to others."""
        if wanted != self._kept:
            fcntl.flock(self._file, fcntl.LOCK_SH if wanted else fcntl.LOCK_UN)
            self._kept = wanted

    def taken(self) -> bool:
        """Whether another process has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)  # at once: it was for the answer only
        return False

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def choose_first_chunk_lock(directory: Path, device: torch.device) -> FirstChunkLock | None:
    """The one of this GPU; None on a CPU, whose cores the system shares out."""
    if device.type != "cuda":
        return None
    return FirstChunkLock(directory / f"first-chunks-{device.index}.lock")
