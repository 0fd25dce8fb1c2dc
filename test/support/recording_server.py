"""A plain HTTP server that has a recording, and some answers that a client must not fall for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.http_thread import serving
from support.server_process import PROMPT_WAV


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))
        match self.path:
            case "/voice.wav?a=b":
                self._answer(200, PROMPT_WAV.read_bytes())
            case "/moved":
                self._answer(302, location="/voice.wav?a=b")
            case "/large":
                self._answer(200, bytes(3 * 2**20))
            case "/slow":
                self._answer(200, b"R")
                time.sleep(3)
            case _:
                self._answer(404)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has had enough
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def recording_server() -> Iterator[ThreadingHTTPServer]:
    """It has `asked`, the (path, Host) of each request."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.asked = []
    with serving(server):
        yield server
