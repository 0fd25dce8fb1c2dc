"""Processes: identity that survives the reuse of process ids, waiting, and killing. Linux only."""

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
    """A TCP port of 127.0.0.1 that nobody listened to a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when process `parent`, which started it, ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def start_time(pid: int) -> str | None:
    """When `pid` started, in clock ticks since boot: with the pid, the identity of a process. None where
    there is no such process any more (or only its remains, which wait to be reaped)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when `pid` ends; None where it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def wait_ended(pidfd: int, timeout: float | None) -> bool:
    """Wait up to `timeout` seconds (None: for ever) until the process ends; whether it did."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout is None else max(0.0, timeout) * 1000))


def kill_all(pids: Iterable[int], wait: float = 2.0) -> None:
    """SIGKILL each of `pids` but this process, and wait until they are gone (at most `wait` seconds)."""
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
