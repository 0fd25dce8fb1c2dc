"""One server among many: a process of its own at a port of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

import httpx

from light_tts.common import process

ASK_SECONDS = 5.0
PAUSE = 0.2  # seconds between two questions whether it is ready


class ServerGone(Exception):
    """The server has ended, or cannot serve any more."""


class ReplicaServer:
    """A server with these flags, started in `directory`. It ends with the process that has made this."""

    def __init__(self, flags: Sequence[str], directory: str) -> None:
        """Returns when it is ready. Raises ServerGone where it cannot start."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "light_tts.server.api_server", *flags]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            preexec_fn=partial(process.die_with_parent, os.getpid()),
        )
        while not self._ready():
            time.sleep(PAUSE)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _ready(self) -> bool:
        self._check_process()
        try:
            return httpx.get(f"{self.url}/readiness", timeout=ASK_SECONDS, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def _check_process(self) -> None:
        if self._process.poll() is not None:
            raise ServerGone(f"the server has ended with code {self._process.returncode}; see its log")

    async def check(self) -> None:
        """Raises ServerGone where it has ended or a stage of it is given up, httpx.TransportError where it
        does not answer. A stage that is started again is no reason: its requests go on."""
        self._check_process()
        async with httpx.AsyncClient(timeout=ASK_SECONDS, trust_env=False) as client:
            stages = (await client.get(f"{self.url}/readiness")).json().get("stages", [])
        failed = [f"{stage['stage']}-{stage['index']}" for stage in stages if stage["state"] == "failed"]
        if failed:
            raise ServerGone(f"given up: {', '.join(failed)}")

    def stop(self, seconds: float) -> None:
        """Let it finish its requests, for at most so many seconds."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
