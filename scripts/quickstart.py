"""The second part of quickstart.sh, after installation: starts a server, speaks one sentence, stops the
server.

    python scripts/quickstart.py ["The sentence to speak."]

MODEL_DIR names a checkpoint other than the bundled voice. On any failure, the server is stopped, the reason
is printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
RECORDING = ROOT / "pretrained_models" / "light-tts-mini" / "voices" / "anna.wav"
LOG = ROOT / "logs" / "quickstart.log"
OUT = ROOT / "out.wav"
SENTENCE = "Good morning. This is the first sentence that this server speaks."
START_SECONDS = 600.0  # on a GPU, kernels are compiled at the first start
STOP_SECONDS = 30.0


class QuickstartError(Exception):
    """A step failed; the message says which and why."""


def say(text: str) -> None:
    print(text, flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server in its own session, stopped at the end of the `with` block."""

    def __init__(self, model_flags: list[str]) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "light_tts.server.api_server", *model_flags),
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
            self._process.kill()  # its supervisor stops the other processes
            self._process.wait()
            say(f"The server did not stop within {STOP_SECONDS:.0f} s and was killed; see {LOG}")

    def wait_until_ready(self) -> None:
        start = time.monotonic()
        shown = -1
        while True:
            waited = time.monotonic() - start
            if self._process.poll() is not None:
                raise QuickstartError(f"the server exited with code {self._process.returncode}{log_end()}")
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
    """Return the last lines of the server's log, for an error message."""
    lines = LOG.read_text(errors="replace").splitlines()[-20:]
    return f"; the end of {LOG}:\n" + "\n".join("    " + line for line in lines)


def ask(method: str, url: str, **options: Any) -> httpx.Response:
    """Return the server's response. Raises QuickstartError if there is none or it is an error."""
    try:
        response = httpx.request(method, url, timeout=300.0, **options)
    except httpx.TransportError as error:
        raise QuickstartError(f"the request failed: {error!r}{log_end()}") from error
    if response.status_code != 200:
        raise QuickstartError(f"the server answered {response.status_code}: {response.text}{log_end()}")
    return response


def speak(url: str, sentence: str, speaker: str | None) -> bytes:
    """Return a WAV file of the sentence, in the voice of a checkpoint speaker or of the recording."""
    fields, files = {"tts_text": sentence, "format": "wav", "seed": "1"}, None
    if speaker:
        fields["spk_id"] = speaker
    else:
        fields["prompt_text"] = RECORDING.with_suffix(".txt").read_text("utf-8").strip()
        files = {"prompt_wav": (RECORDING.name, RECORDING.read_bytes(), "audio/wav")}
    say(f"Speaking with the voice of {speaker or RECORDING.relative_to(ROOT)}: {sentence}")
    return ask("POST", f"{url}/inference_zero_shot", data=fields, files=files).content


def say_what_next(model_flags: list[str], speakers: list[str]) -> None:
    server = shlex.join(["python", "-m", "light_tts.server.api_server", *model_flags])
    recording = '-F prompt_wav=@voice.wav -F prompt_text="Its transcript."'
    voices = [f"-F spk_id={name}" for name in speakers] + [recording]
    say(
        f"""
Hear it:          aplay {OUT.name}
Start a server:   source .venv/bin/activate && {server}
Let it speak:     curl http://localhost:8080/inference_zero_shot {voices[0]} \\
                      -F tts_text="Hello there." -F format=wav -o speech.wav"""
    )
    if speakers:
        say(f"Another voice:    {' or '.join(voices[1:][-2:])}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sentence", nargs="?", default=SENTENCE, help="the sentence to speak")
    sentence = parser.parse_args().sentence
    model_dir = os.environ.get("MODEL_DIR")
    model_flags = ["--model_dir", str(Path(model_dir).resolve())] if model_dir else []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))
    try:
        with Server(model_flags) as server:
            server.wait_until_ready()
            speakers = ask("GET", f"{server.url}/spk_list").json()["checkpoint_speakers"]
            start = time.monotonic()
            OUT.write_bytes(speak(server.url, sentence, speakers[0] if speakers else None))
            seconds = time.monotonic() - start
    except QuickstartError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted", file=sys.stderr)
        return 130
    with wave.open(str(OUT)) as made:
        length = made.getnframes() / made.getframerate()
    say(f"{OUT}: {length:.2f} s of speech, made in {seconds:.2f} s (real-time factor {seconds / length:.2f})")
    say_what_next(model_flags, speakers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
