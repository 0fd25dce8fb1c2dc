"""The open-file limit of a process, which bounds its connections."""

from __future__ import annotations

import resource

MOST = 2**20  # more than any server needs; used where the system has no hard limit
SHARE_FOR_CONNECTIONS = 0.75  # leaves the rest for inter-process sockets, uploads on disk and libraries


def raise_limit() -> tuple[int, int]:
    """Raise the soft limit of this process and its future children to the hard limit; return (before,
    after).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft, soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return soft, wanted


def most_connections(wanted: int) -> int:
    """Return `wanted`, or less if this process may not open that many files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, int(soft * SHARE_FOR_CONNECTIONS)))
