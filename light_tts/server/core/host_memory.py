"""How much of the host's memory the flow's cached state may take on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

from light_tts.server.core.settings import Settings

# --flow_memory_mb auto: the part of the memory that all decode processes together may take, and the least for
# each of them, in bytes.
PART = 1 / 4
LEAST = 1 << 30


def flow_memory(settings: Settings) -> int:
    """Return the bytes of --flow_memory_mb for a decode process."""
    if settings.flow_memory_mb != "auto":
        return settings.flow_memory_mb << 20
    return max(LEAST, int(PART * memory() / settings.decode_process_num))


def memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use: all that the machine has, or the limit of a
    control group (version 2; those of containers and of systemd's services). root: of the file system."""
    return min([psutil.virtual_memory().total, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Yield the limits of this process's control group and those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for group in (PurePosixPath(path), *PurePosixPath(path).parents):
        try:
            limit = (root / "sys/fs/cgroup" / group / "memory.max").read_text().strip()
        except OSError:  # the root has no limit
            continue
        if limit != "max":
            yield int(limit)
