"""Limits shared by the connections of one HTTP worker: the number of connections, and the bytes of received
requests that are not being processed yet."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from light_tts.server.core import metrics
from light_tts.server.core.open_files import most_connections
from light_tts.server.core.settings import Settings

# Reserved above --max_connections for status requests.
RESERVED_CONNECTIONS = 32
STATUS_PATHS = frozenset(("/liveness", "/readiness", "/health", "/healthz", "/metrics"))
SECONDS_BETWEEN_WARNINGS = 10.0

log = logging.getLogger("light_tts.http")


class Refusal(Exception):
    """The connection gets this response and is closed. `status`: HTTP status."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
        metrics.refused_connections_total.labels(str(status)).inc()


class Closable(Protocol):
    """A connection as seen by the gate."""

    def make_room(self) -> None:
        """Close: the connection is idle and its slot is needed for another one."""


class Gate:
    """Connection and memory limits of one HTTP worker."""

    def __init__(self, settings: Settings) -> None:
        self.max_connections = most_connections(settings.max_connections)
        self.max_body = int(settings.max_upload_mb * 2**20)
        self.max_waiting = int(settings.max_inflight_upload_mb * 2**20)
        self.header_timeout = settings.header_timeout
        self.body_timeout = settings.body_timeout
        self.waiting = 0  # bytes held by all uploads
        # new connections go to another server; each existing one ends after its next response
        self.leaving = False
        self._open: set[Closable] = set()
        self._idle: dict[Closable, None] = {}  # in the order in which they became idle
        self._next_warning = 0.0

    # -- connections

    @property
    def full(self) -> bool:
        """Whether only the paths in STATUS_PATHS are served."""
        return len(self._open) > self.max_connections

    def enter(self, connection: Closable) -> None:
        """Register a new connection, idle until it calls `busy`. If there are too many, the one idle longest
        is closed."""
        self._open.add(connection)
        self._idle[connection] = None
        metrics.http_connections.inc()
        if not self.full:
            return
        oldest = next(iter(self._idle))
        if oldest is not connection or len(self._open) > self.max_connections + RESERVED_CONNECTIONS:
            self.leave(oldest)
            oldest.make_room()
        if time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + SECONDS_BETWEEN_WARNINGS
            log.warning(
                "--max_connections: all %d are open (%d idle); the one idle longest is closed for each "
                "new one, or new ones get 503 if none is idle",
                self.max_connections,
                len(self._idle),
            )

    def leave(self, connection: Closable) -> None:
        """Unregister a connection. May be called twice."""
        if connection in self._open:
            self._open.remove(connection)
            self._idle.pop(connection, None)
            metrics.http_connections.dec()

    def idle(self, connection: Closable) -> None:
        """The connection waits for its next request."""
        if connection in self._open:
            self._idle[connection] = None

    def busy(self, connection: Closable) -> None:
        self._idle.pop(connection, None)

    def replace(self, connection: Closable, successor: Closable) -> None:
        """The same connection is handled by another object from now on."""
        self.leave(connection)
        self._open.add(successor)
        metrics.http_connections.inc()

    # -- buffered bytes

    def check_announced(self, size: int) -> None:
        """Raise Refusal (413, 429) if a body of this many bytes cannot be accepted."""
        if size > self.max_body:
            raise Refusal(413, f"the request's body is above {self.max_body / 2**20:g} MiB")
        if self.waiting + size > self.max_waiting:
            raise self.too_much_waits()

    def too_much_waits(self) -> Refusal:
        return Refusal(
            429,
            f"the bodies of other requests use {self.waiting / 2**20:.0f} of the "
            f"{self.max_waiting / 2**20:g} MiB of --max_inflight_upload_mb; try again later",
            retry_after=1,
        )


class Upload:
    """The buffered bytes of one request or WebSocket."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._bytes = 0
        self._released = False

    def set(self, size: int) -> None:
        """Set the number of bytes held. Raises Refusal (429) if the total is too large."""
        if self._released:
            return
        grown = size > self._bytes
        self._gate.waiting += size - self._bytes
        self._bytes = size
        if grown and self._gate.waiting > self._gate.max_waiting:
            raise self._gate.too_much_waits()

    def release(self) -> None:
        """The request's data has been processed and no longer counts. May be called twice."""
        self.set(0)
        self._released = True
