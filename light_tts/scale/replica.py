"""One of several servers: a separate process on a port of this machine."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

import httpx
from prometheus_client.parser import text_string_to_metric_families

from light_tts.common import process

ASK_SECONDS = 5.0
PAUSE = 0.2  # seconds between readiness checks
PORT_SECONDS = 5.0  # within which the other processes of a server that has been killed end, and free its port

log = logging.getLogger("light_tts.scale")


class ServerGone(Exception):
    """The server has exited or can no longer serve."""


class ReplicaServer:
    """A server with these flags, started in `directory` and restarted when it has exited. It ends with the
    process that created this object."""

    def __init__(self, flags: Sequence[str], directory: str) -> None:
        """Returns when the server is ready. Raises ServerGone if it cannot start."""
        self._port = process.free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._command = [sys.executable, "-m", "light_tts.server.api_server", *flags]
        self._command += ["--host", "127.0.0.1", "--port", str(self._port)]
        self._directory = directory
        self._ready = False  # it has been ready since it was started
        self._start()
        while not self._ready:
            self._check_process()
            try:
                answer = httpx.get(f"{self.url}/readiness", timeout=ASK_SECONDS, trust_env=False)
                self._ready = answer.is_success
            except httpx.TransportError:
                time.sleep(PAUSE)

    def _start(self) -> None:
        self._ready = False
        self._process = subprocess.Popen(
            self._command,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            preexec_fn=partial(process.die_with_parent, os.getpid()),
        )

    def _check_process(self) -> None:
        if self._process.poll() is not None:
            raise ServerGone(f"the server has ended with code {self._process.returncode}; see its log")

    async def check(self) -> None:
        """Restart a server that has exited, once. Raises ServerGone if its port stays in use, the new one
        exits before it is ready or a stage has been given up, httpx.TransportError if it does not answer. A
        stage being restarted is not an error: its requests continue."""
        if self._process.poll() is not None and self._ready:
            log.error("the server has exited with code %s: restarting it", self._process.returncode)
            await self._wait_for_port()
            self._start()
        self._check_process()
        async with httpx.AsyncClient(timeout=ASK_SECONDS, trust_env=False) as client:
            try:
                answer = await client.get(f"{self.url}/readiness")
            except httpx.TransportError:
                if self._ready:
                    raise
                return  # still loading
        self._ready = self._ready or answer.is_success
        stages = answer.json().get("stages", [])
        failed = [f"{stage['stage']}-{stage['index']}" for stage in stages if stage["state"] == "failed"]
        if failed:
            raise ServerGone(f"given up: {', '.join(failed)}")

    async def _wait_for_port(self) -> None:
        """Wait until the port is free. Raises ServerGone after PORT_SECONDS."""
        end = time.monotonic() + PORT_SECONDS
        while not process.is_free(self._port):
            if time.monotonic() > end:
                raise ServerGone(f"port {self._port} of the server that has exited is still in use")
            await asyncio.sleep(PAUSE)

    async def metric(self, name: str) -> float:
        """The sum of this metric of the server, without its labels. Raises httpx.HTTPError."""
        async with httpx.AsyncClient(timeout=ASK_SECONDS, trust_env=False) as client:
            answer = await client.get(f"{self.url}/metrics")
        families = text_string_to_metric_families(answer.raise_for_status().text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def stop(self, seconds: float) -> None:
        """Let the server finish its requests, for at most `seconds`."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
