"""One stage process and the watcher that reports when and why it ends."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping

from light_tts.common import process

TAIL_LINES = 8


class StageProcess:
    """Starts `command` and calls `on_end(self)` when it has ended.

    Its standard error is forwarded to ours and, line by line, to `log_line`; the last lines are kept to
    explain an unexpected end. `failure`: the error that the stage itself reported, if any.
    """

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        log_line: Callable[[str], None],
        on_end: Callable[[StageProcess], None],
    ) -> None:
        self.failure = ""
        self._log_line = log_line
        self._on_end = on_end
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._partial = b""
        self._loop = asyncio.get_running_loop()
        self._popen = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self.pid = self._popen.pid
        assert self._popen.stderr is not None  # it is a pipe
        self._pipe = self._popen.stderr
        self._stderr = self._pipe.fileno()
        os.set_blocking(self._stderr, False)
        self._loop.add_reader(self._stderr, self._take_stderr)
        self.pidfd = os.pidfd_open(self.pid)  # our child, which exists until we wait for it
        self._loop.add_reader(self.pidfd, self._ended)

    @property
    def alive(self) -> bool:
        return self._popen.returncode is None

    def end(self, reason: str) -> None:
        """Kill the process for this reason; `on_end` follows."""
        self.failure = reason
        self._popen.kill()

    def kill(self) -> None:
        """Kill the process without calling `on_end`."""
        if self.alive:
            self._popen.kill()
            self._close()

    def wait(self, timeout: float) -> bool:
        """Block up to `timeout` seconds for the end; return whether it has ended."""
        return not self.alive or process.wait_ended(self.pidfd, timeout)

    def reason(self) -> str:
        """Why it ended, in words for the operator."""
        code = self._popen.returncode
        if self.failure:
            return self.failure
        if code == -signal.SIGKILL:
            return "killed (out of memory?)"
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return "\n  ".join([how, *self._tail])

    def _take_stderr(self) -> None:
        try:
            data = os.read(self._stderr, 65536)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._stderr)
            return
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._tail.append(text)
                self._log_line(text)

    def _ended(self) -> None:
        self._take_stderr()
        self._close()
        # The stage's own error message (StageStartFailed) may still be in flight.
        delay = 0.3 if self._popen.returncode == 1 and not self.failure else 0
        self._loop.call_later(delay, self._on_end, self)

    def _close(self) -> None:
        self._loop.remove_reader(self._stderr)
        self._loop.remove_reader(self.pidfd)
        self._popen.wait()
        self._pipe.close()
        os.close(self.pidfd)
