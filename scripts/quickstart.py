"""What quickstart.sh does once the packages are there: start a server, let it speak once, stop it.

Whatever fails, the server is stopped, the reason printed and the exit code is 1.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import wave
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
PROMPT = ROOT / "test" / "golden" / "cosyvoice2" / "prompt.wav"
TINY = ROOT / "pretrained_models" / "tiny"
LOG = ROOT / "logs" / "quickstart.log"
OUT = ROOT / "out.wav"
TEXT = "Good morning. This is the first sentence that this server speaks."
START_SECONDS = 600.0  # on a GPU kernels are compiled at the first start
STOP_SECONDS = 30.0


class QuickstartError(Exception):
    """A step failed; the message says which and why."""


def say(text: str) -> None:
    print(text, flush=True)


def checkpoint() -> tuple[Path, bool]:
    """Directory of the checkpoint to use, and whether its weights are random."""
    if os.environ.get("MODEL_DIR"):
        return Path(os.environ["MODEL_DIR"]).resolve(), False
    if not (TINY / "cosyvoice2.yaml").exists():
        say(f"Making a tiny checkpoint with random weights in {TINY.relative_to(ROOT)}")
        unfinished = TINY.with_name("tiny.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, "scripts/make_tiny_checkpoint.py", "--size", "tiny", "--seed", "0"]
        if subprocess.run([*command, "--out", str(unfinished)], cwd=ROOT).returncode:
            raise QuickstartError("scripts/make_tiny_checkpoint.py failed; its message is above")
        unfinished.rename(TINY)
    return TINY, True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server in a session of its own, stopped when the `with` block is left."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "light_tts.server.api_server", "--model_dir", str(model_dir)),
            *("--host", "127.0.0.1", "--port", str(port), "--log_dir", str(LOG.parent)),
        ]

    def __enter__(self) -> Server:
        LOG.parent.mkdir(exist_ok=True)
        say("Starting: " + " ".join(["python", *self._command[1:]]))
        with LOG.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is not None:
            return
        say("Stopping the server")
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its supervisor ends the rest
            self._process.wait()
            say(f"The server did not stop within {STOP_SECONDS:.0f} s and was killed; see {LOG}")

    def wait_until_ready(self) -> None:
        start = time.monotonic()
        shown = -1
        while True:
            waited = time.monotonic() - start
            if self._process.poll() is not None:
                raise QuickstartError(
                    f"the server ended with exit code {self._process.returncode}{log_end()}"
                )
            if waited > START_SECONDS:
                raise QuickstartError(f"the server was not ready after {START_SECONDS:.0f} s{log_end()}")
            try:
                if httpx.get(f"{self.url}/readiness", timeout=5.0).status_code == 200:
                    say(f"Ready after {waited:.1f} s")
                    return
            except httpx.TransportError:
                pass  # not listening yet
            if int(waited) // 5 > shown:
                shown = int(waited) // 5
                say(f"Waiting for the server: {waited:.0f} s")
            time.sleep(0.2)


def log_end() -> str:
    """The last lines of the server's log, for an error message."""
    lines = LOG.read_text(errors="replace").splitlines()[-20:]
    return f"; the end of {LOG}:\n" + "\n".join("    " + line for line in lines)


def speak(url: str) -> bytes:
    """Send the recording and the text; the WAV file that comes back."""
    say(f"Sending {PROMPT.relative_to(ROOT)} and the text: {TEXT}")
    start = time.monotonic()
    try:
        response = httpx.post(
            f"{url}/inference_zero_shot",
            data={
                "tts_text": TEXT,
                "prompt_text": PROMPT.with_suffix(".txt").read_text("utf-8").strip(),
                "format": "wav",
                "seed": "1",
            },
            files={"prompt_wav": (PROMPT.name, PROMPT.read_bytes(), "audio/wav")},
            timeout=300.0,
        )
    except httpx.TransportError as error:
        raise QuickstartError(f"the request failed: {error!r}{log_end()}") from error
    if response.status_code != 200:
        raise QuickstartError(f"the server answered {response.status_code}: {response.text}{log_end()}")
    say(f"Answered after {time.monotonic() - start:.1f} s")
    return response.content


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))
    try:
        model_dir, random_weights = checkpoint()
        with Server(model_dir) as server:
            server.wait_until_ready()
            OUT.write_bytes(speak(server.url))
    except QuickstartError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted", file=sys.stderr)
        return 130
    with wave.open(str(OUT)) as made:
        say(f"{OUT}: {made.getnframes() / made.getframerate():.2f} s of audio at {made.getframerate()} Hz")
    if random_weights:
        say(
            "The checkpoint has random weights, so this sounds like noise, not like speech.\n"
            "With a real one: MODEL_DIR=/path/to/CosyVoice2-0.5B bash scripts/quickstart.sh"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
