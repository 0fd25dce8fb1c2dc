"""The limit of open files of a process, each connection being one."""

from __future__ import annotations

import resource

MOST = 2**20  # more than any server needs; some systems have no hard limit
SHARE_FOR_CONNECTIONS = 0.75  # the rest: sockets between processes, uploads on disk, libraries


def raise_limit() -> tuple[int, int]:
    """Raise the soft limit of this process, and of those it will start, to the hard one; (before, after)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft, soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return soft, wanted


def most_connections(wanted: int) -> int:
    """`wanted`, or less where this process may not open so many files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, int(soft * SHARE_FOR_CONNECTIONS)))
