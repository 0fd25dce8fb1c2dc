"""Runs the real server for tests: `with start_server(decode_process_num=2) as server: ...`"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from support.processes import command_line

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "test" / "golden" / "cosyvoice2"
CHECKPOINT = GOLDEN / "checkpoint"
PROMPT_WAV = GOLDEN / "prompt.wav"
PROMPT_TEXT = (GOLDEN / "prompt.txt").read_text().strip()
VOICE = ROOT / "pretrained_models" / "light-tts-mini"
START_TIMEOUT = 120.0
STOP_TIMEOUT = 60.0

SMALL = {
    "max_total_token_num": 8192,
    "max_req_total_len": 4096,
    "max_part_tokens": 40_000,  # so that a request can be as long as a test wants
    "load_trt": False,
}
FEW_STEPS = {"n_timesteps": 2}  # of 10: half of the time of speech, where only its length or sameness counts
LARGE = {"max_total_token_num": 65536, "max_req_total_len": 32768}  # for requests of minutes


@dataclass
class Server:
    """A running server. `directory` holds its sockets, voices and logs."""

    port: int
    directory: Path
    process: subprocess.Popen
    flags: dict[str, object] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """Process id of the front process, the parent of all."""
        return self.process.pid

    @property
    def url(self) -> str:
        scheme = "https" if "ssl_certfile" in self.flags else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """The output of the command so far."""
        return (self.directory / "output.log").read_text(errors="replace")

    @property
    def workers(self) -> list[psutil.Process]:
        """The HTTP workers: forks of the front process, with its command line."""
        front = psutil.Process(self.pid)
        return [child for child in front.children() if command_line(child) == front.cmdline()]

    def client(self, **options) -> httpx.Client:
        """A client without certificates, which take longer to load than most requests."""
        return httpx.Client(base_url=self.url, **{"timeout": 120.0, "verify": False, **options})

    def readiness(self) -> httpx.Response:
        return httpx.get(f"{self.url}/readiness", timeout=10, verify=False)

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}:\n{self.output}")
            with contextlib.suppress(httpx.HTTPError):
                if self.readiness().status_code == 200:
                    return
            time.sleep(0.2)
        raise TimeoutError(f"the server is not ready after {timeout:g} s:\n{self.output}")

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that have these labels."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics", timeout=30, verify=False).text.splitlines():
            sample, _, value = line.rpartition(" ")
            base, _, label_text = sample.partition("{")
            if base == name and all(f'{key}="{wanted}"' in label_text for key, wanted in labels.items()):
                total += float(value)
        return total

    def stop(self) -> int:
        """SIGTERM, as an operator would; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise TimeoutError(
                f"the server did not end within {STOP_TIMEOUT:g} s:\n{self.output[-4000:]}"
            ) from None

    def leftovers(self) -> list[str]:
        """Return files of this server that still exist: sockets, shared memory."""
        name = f"light_tts-{self.port}-*"
        return [
            str(path) for place in (Path("/dev/shm"), self.directory / "ipc") for path in place.glob(name)
        ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def launch(
    wait: bool = True,
    timeout: float = START_TIMEOUT,
    python: Path | str = sys.executable,
    cwd: Path = ROOT,
    preexec: Callable[[], None] | None = None,
    program: Sequence[str] = ("-m", "light_tts.server.api_server"),
    **flags: object,
) -> Iterator[Server]:
    """Start Python with `program` in the directory `cwd` with these flags added to small defaults (None: omit
    that flag); `wait`: until it is ready, at most `timeout` seconds. `preexec` is called in its process
    before it starts. It is stopped at the end if it is still running."""
    with tempfile.TemporaryDirectory(prefix="ltts-") as name:
        directory = Path(name)
        port = free_port()
        flags = {
            "host": "127.0.0.1",
            "port": port,
            "model_dir": CHECKPOINT,
            "zmq_mode": f"ipc://{directory / 'ipc'}/",
            "spk_dir": directory / "voices",
            "log_dir": directory / "logs",
            **SMALL,
            **flags,
        }
        command = [str(python), *program]
        for flag, value in flags.items():
            command += [] if value is None else [f"--{flag}", str(value)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(directory / "output.log", "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=preexec,
            )
        server = Server(int(flags["port"]), directory, process, flags)
        try:
            if wait:
                server.wait_until_ready(timeout)
            yield server
        finally:
            server.stop()


def start_server(**flags: object) -> contextlib.AbstractContextManager[Server]:
    """A server that is ready."""
    return launch(wait=True, **flags)


def speak(client: httpx.Client, text: str, **fields: object) -> httpx.Response:
    """POST /inference_zero_shot as a form, with the golden prompt unless `fields` choose another voice."""
    data = {"tts_text": text, "max_new_tokens": 40, "min_new_tokens": 1}
    if "spk_id" not in fields:
        data["prompt_text"] = PROMPT_TEXT
    data.update(fields)
    data = {key: str(value) for key, value in data.items() if value is not None}
    files = None if "spk_id" in fields else {"prompt_wav": ("prompt.wav", PROMPT_WAV.read_bytes())}
    return client.post("/inference_zero_shot", data=data, files=files)
