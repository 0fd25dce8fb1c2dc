"""The server as the command's client sees it: one that runs, or one that is started for a while."""

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
SILENCE_SECONDS = 300.0  # without a byte, after which a request has failed
TRIES = 8  # of a request that the server is too busy for, or whose connection breaks
LONGEST_WAIT = 30.0  # seconds between two


class Problem(Exception):
    """The command cannot do what it was asked for; the message says why, and what to do."""


@dataclass
class Voice:
    """One that the server knows by name, or that of a recording with what is said in it."""

    name: str | None = None
    recording: bytes | None = None
    text: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of /v1/audio/speech that choose the voice."""
        if self.recording is None:
            return {"voice": self.name}
        return {"ref_audio": base64.b64encode(self.recording).decode(), "ref_text": self.text}


@dataclass
class Client:
    """`key`: an API key, where the server wants one."""

    url: str
    key: str = ""
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(SILENCE_SECONDS, connect=10.0)
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Raises Problem, unless the server answers well."""
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
        """As /spk_list says."""
        return self.ask("GET", "/spk_list").json()

    def speech(self, text: str, voice: Voice, options: Mapping[str, Any]) -> Iterator[tuple[int, bytes]]:
        """Sample rate and PCM as they come; `options`: further fields of /v1/audio/speech. Waits where the
        server is busy; a connection that breaks before the first byte is tried again. Raises Problem."""
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
                    raise Problem(f"{self.url}: the speech broke off: {error}") from None
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


# ---------------------------------------------------------------- which server


def add_server_arguments(parser: argparse.ArgumentParser, nested: bool = False) -> None:
    """`nested`: the parser before this one has them too, so that they may stand on either side."""
    url, key = (argparse.SUPPRESS, argparse.SUPPRESS) if nested else (None, os.environ.get(KEY_VARIABLE, ""))
    parser.add_argument("--url", default=url, help=f"the server (default: {DEFAULT_URL})")
    parser.add_argument("--key", default=key, help=f"API key (default: ${KEY_VARIABLE})")


def running(args: argparse.Namespace) -> Client:
    """The server that the arguments name, which must be there. Raises Problem."""
    client = Client(args.url or DEFAULT_URL, args.key)
    client.ask("GET", "/liveness")
    return client


@contextlib.contextmanager
def running_or_started(args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[Client]:
    """The server that the arguments name, or the one at the default address; where none is there, one of its
    own, which is stopped at the end. `args.model_dir` and `args.device` are for that one."""
    url = args.url or DEFAULT_URL
    if args.url or (not args.model_dir and _alive(url)):
        yield running(args)
        return
    say("starting a server (a running one saves this: light-tts serve) ...")
    with _started(args) as own:
        yield Client(own)


def _alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/liveness", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def _started(args: argparse.Namespace) -> Iterator[str]:
    """The address of a server on a free port. It ends with this process, whatever ends it."""
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
            start_new_session=True,  # Ctrl-C is for this process, which stops the server then
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
