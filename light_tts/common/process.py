"""Process utilities: identities that survive pid reuse, waiting, and killing. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import time
from collections.abc import Iterable

_PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free at the time of the call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    """Return whether a server can listen on this TCP port of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent process `parent` ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def start_time(pid: int) -> str | None:
    """Return the start time of `pid` in clock ticks since boot, which together with the pid identifies a
    process. None if the process does not exist or is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when `pid` ends, or None if it has already ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def wait_ended(pidfd: int, timeout: float | None) -> bool:
    """Wait up to `timeout` seconds (None: forever) for the process to end; return whether it has."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout is None else max(0.0, timeout) * 1000))


def kill_all(pids: Iterable[int], wait: float = 2.0) -> None:
    """SIGKILL all `pids` except this process and wait up to `wait` seconds until they are gone."""
    watched = []
    for pid in pids:
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            watched.append(os.pidfd_open(pid))
            signal.pidfd_send_signal(watched[-1], signal.SIGKILL)
    deadline = time.monotonic() + wait
    for pidfd in watched:
        wait_ended(pidfd, deadline - time.monotonic())
        os.close(pidfd)
