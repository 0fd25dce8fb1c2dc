"""The channel between the front process (gunicorn's master) and the supervisor: a socket pair with JSON
lines.

supervisor -> front: {"event": "ready"} | {"event": "failed", "reason"} | {"event": "replaced"}
    | {"event": "exit", "code", "reason"}
front -> supervisor: {"event": "drain"} | {"event": "stop"}
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
from typing import Any


class Control:
    """One end of the channel."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._socket.setblocking(False)
        self._buffer = b""
        self.closed = False  # the other end has closed

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, event: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # the reader notices that the other end has closed
            self._socket.sendall(json.dumps({"event": event, **fields}).encode() + b"\n")

    def receive(self, timeout: float | None = 0.0) -> list[dict[str, Any]]:
        """Return the events that have arrived; wait up to `timeout` seconds for one (None: forever)."""
        if not select.select([self._socket], [], [], timeout)[0]:
            return []
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.closed = not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self._socket.close()
