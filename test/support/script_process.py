"""A script that becomes a server, as a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from support.processes import find_below
from support.server_process import CHECKPOINT, START_TIMEOUT, free_port


def environment(**changes: object) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    for name in ("MODEL_DIR", "WORKERS", "HOST", "PORT", "LIGHT_TTS_FLAGS", "LIGHT_TTS_CONFIG"):
        clean.pop(name, None)
    return {**clean, "PYTHON": sys.executable, **{name: str(value) for name, value in changes.items()}}


@dataclass
class Script:
    port: int
    process: subprocess.Popen
    log: Path

    def ask(self, path: str, **options) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=60, verify=False, **options)

    def stages(self) -> list[psutil.Process]:
        return find_below(self.process.pid, "light_tts.server.core.stage_main")


@contextlib.contextmanager
def running(tmp_path: Path, command: list[str], **variables: object) -> Iterator[Script]:
    """Run a script that becomes the server; yields once it is ready, then stops it with SIGTERM and checks
    that it exits properly and leaves nothing behind."""
    port = free_port()
    log = tmp_path / "output.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--spk_dir", str(tmp_path / "voices"), "--log_dir", str(tmp_path / "logs")],
            cwd=tmp_path,
            env=environment(**{"PORT": port, "MODEL_DIR": CHECKPOINT, **variables}),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    script = Script(port, process, log)
    try:
        wait_until_ready(script)
        yield script
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
        assert not list(Path("/dev/shm").glob(f"light_tts-{port}-*"))
        assert not list(Path("/tmp").glob(f"light_tts-{port}-*"))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until_ready(script: Script) -> None:
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        assert script.process.poll() is None, script.log.read_text()
        with contextlib.suppress(httpx.HTTPError):
            if script.ask("/readiness").status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(script.log.read_text())
