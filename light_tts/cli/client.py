"""The client for a server that is running, or that is started temporarily."""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from light_tts.common.process import die_with_parent, free_port

DEFAULT_URL = "http://localhost:8080"
KEY_VARIABLE = "LIGHT_TTS_API_KEY"
START_SECONDS = 600.0  # kernels are compiled at the first start on a GPU
STOP_SECONDS = 30.0
SILENCE_SECONDS = 300.0  # without receiving any data, after which a request has failed
TRIES = 8  # attempts per request if the server is too busy or the connection breaks
LONGEST_WAIT = 30.0  # seconds between two attempts


class Problem(Exception):
    """The command cannot be carried out; the message says why and what to do."""


@dataclass
class ChosenVoice:
    """A voice known to the server by name, or a recording with its transcript."""

    name: str | None = None
    recording: bytes | None = None
    text: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of /v1/audio/speech that select the voice."""
        if self.recording is None:
            return {"voice": self.name}
        return {"ref_audio": base64.b64encode(self.recording).decode(), "ref_text": self.text}


@dataclass
class Client:
    """HTTP client for one server. `key`: API key, if the server requires one."""

    url: str
    key: str = ""
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=10.0)
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request. Raises Problem unless it succeeds."""
        try:
            answer = self.http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise Problem(
                f"{self.url} cannot be reached ({error}); start a server: light-tts serve"
            ) from None
        if answer.is_error:
            raise Problem(_reason(answer))
        return answer

    def voices(self) -> dict[str, list[str]]:
        """Return the response of /spk_list."""
        return self.ask("GET", "/spk_list").json()

    def speech(
        self, text: str, voice: ChosenVoice, options: Mapping[str, Any]
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (sample rate, PCM) as they arrive; `options`: further fields of /v1/audio/speech. Waits while
        the server is busy, and retries if the connection breaks before the first byte. Raises Problem."""
        body = {"input": text, "response_format": "pcm", **voice.fields, **options}
        for attempt in range(TRIES):
            begun = False
            try:
                with self.http.stream("POST", "/v1/audio/speech", json=body) as answer:
                    if answer.status_code in (429, 503) and attempt < TRIES - 1:
                        wait = float(answer.headers.get("Retry-After", 2**attempt))
                    elif answer.is_error:
                        answer.read()
                        raise Problem(_reason(answer))
                    else:
                        rate = int(answer.headers["X-Sample-Rate"])
                        for piece in answer.iter_bytes():
                            begun = True
                            yield rate, piece
                        return
            except httpx.HTTPError as error:
                if begun or attempt == TRIES - 1:
                    raise Problem(f"{self.url}: the speech was cut off: {error}") from None
                wait = 2.0**attempt
            time.sleep(min(wait, LONGEST_WAIT))


def _reason(answer: httpx.Response) -> str:
    try:
        body = answer.json()
        message = body.get("message") or body["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = answer.text[:200] or answer.reason_phrase
    hint = f" (--key, or {KEY_VARIABLE} in the environment)" if answer.status_code == 401 else ""
    return f"the server answered {answer.status_code}: {message}{hint}"


# ---------------------------------------------------------------- choice of the server


def add_server_arguments(parser: argparse.ArgumentParser, nested: bool = False) -> None:
    """`nested`: the parent parser has the same arguments, so that they may be given on either side."""
    url, key = (argparse.SUPPRESS, argparse.SUPPRESS) if nested else (None, os.environ.get(KEY_VARIABLE, ""))
    parser.add_argument("--url", default=url, help=f"the server (default: {DEFAULT_URL})")
    parser.add_argument("--key", default=key, help=f"API key (default: ${KEY_VARIABLE})")


def running(args: argparse.Namespace) -> Client:
    """Return a client for the server given by the arguments. Raises Problem if it is not running."""
    client = Client(args.url or DEFAULT_URL, args.key)
    client.ask("GET", "/liveness")
    return client


@contextlib.contextmanager
def running_or_started(args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[Client]:
    """Context manager for the server given by the arguments, or the one at the default address, or else a
    temporary one with `args.model_dir` and `args.device`, which is stopped at the end."""
    url = args.url or DEFAULT_URL
    if args.url or (not args.model_dir and _alive(url)):
        yield running(args)
        return
    say("starting a server (to avoid this, keep one running: light-tts serve) ...")
    with _started(args) as own:
        yield Client(own)


def _alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/liveness", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def _started(args: argparse.Namespace) -> Iterator[str]:
    """Context manager for the address of a server on a free port, which ends with this process in any
    case.
    """
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "light_tts.server.api_server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--log_dir", "", "--device", args.device]
    command += ["--model_dir", args.model_dir] if args.model_dir else []
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is meant for this process, which then stops the server
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        try:
            url = f"http://127.0.0.1:{port}"
            end = time.monotonic() + START_SECONDS
            while not _ready(url):
                if process.poll() is not None or time.monotonic() > end:
                    output.seek(0)
                    lines = output.read().decode(errors="replace").strip().splitlines()
                    raise Problem("the server did not start:\n" + "\n".join(lines[-5:]))
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readiness", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
