"""What the connections of one HTTP worker share: how many there may be, and how many bytes of requests that
are not yet in work may wait in its memory."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from light_tts.server.core import metrics
from light_tts.server.core.open_files import most_connections
from light_tts.server.core.settings import Settings

# Kept free above --max_connections, for those who ask how the server is.
RESERVED_CONNECTIONS = 32
STATUS_PATHS = frozenset(("/liveness", "/readiness", "/health", "/healthz", "/metrics"))
SECONDS_BETWEEN_WARNINGS = 10.0

log = logging.getLogger("light_tts.http")


class Refusal(Exception):
    """A connection gets this answer and is closed. `status` is that of HTTP."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
        metrics.refused_connections_total.labels(str(status)).inc()


class Closable(Protocol):
    """A connection, as the gate sees it."""

    def make_room(self) -> None:
        """Close: the connection has nothing under way and another one needs its place."""


class Gate:
    """One in each HTTP worker."""

    def __init__(self, settings: Settings) -> None:
        self.max_connections = most_connections(settings.max_connections)
        self.max_body = int(settings.max_upload_mb * 2**20)
        self.max_waiting = int(settings.max_inflight_upload_mb * 2**20)
        self.header_timeout = settings.header_timeout
        self.body_timeout = settings.body_timeout
        self.waiting = 0  # bytes of all shares
        self.leaving = False  # new connections go to another server: each here ends with its next answer
        self._open: set[Closable] = set()
        self._idle: dict[Closable, None] = {}  # in the order in which they became idle
        self._next_warning = 0.0

    # -- connections

    @property
    def full(self) -> bool:
        """Whether only the paths in STATUS_PATHS are answered."""
        return len(self._open) > self.max_connections

    def enter(self, connection: Closable) -> None:
        """Count a new connection, idle until it says `busy`; where there are too many, the one that has been
        idle longest has to go."""
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
                "--max_connections: all %d are open (%d idle): those idle longest are closed for new ones; "
                "with none idle, new ones get 503",
                self.max_connections,
                len(self._idle),
            )

    def leave(self, connection: Closable) -> None:
        """It has ended. May be called twice."""
        if connection in self._open:
            self._open.remove(connection)
            self._idle.pop(connection, None)
            metrics.http_connections.dec()

    def idle(self, connection: Closable) -> None:
        """It waits for its next request."""
        if connection in self._open:
            self._idle[connection] = None

    def busy(self, connection: Closable) -> None:
        self._idle.pop(connection, None)

    def replace(self, connection: Closable, successor: Closable) -> None:
        """The same connection is handled by another object from now on."""
        self.leave(connection)
        self._open.add(successor)
        metrics.http_connections.inc()

    # -- bytes that wait

    def check_announced(self, size: int) -> None:
        """Raises Refusal (413, 429) where a body of this many bytes cannot be taken."""
        if size > self.max_body:
            raise Refusal(413, f"the request's body is above {self.max_body / 2**20:g} MiB")
        if self.waiting + size > self.max_waiting:
            raise self.too_much_waits()

    def too_much_waits(self) -> Refusal:
        return Refusal(
            429,
            f"the bodies of other requests take {self.waiting / 2**20:.0f} of the "
            f"{self.max_waiting / 2**20:g} MiB of --max_inflight_upload_mb; try again later",
            retry_after=1,
        )


class Upload:
    """The share of one request, or one WebSocket, in the bytes that wait."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._bytes = 0
        self._released = False

    def set(self, size: int) -> None:
        """It holds so many bytes now. Raises Refusal (429) where all together are too many."""
        if self._released:
            return
        grown = size > self._bytes
        self._gate.waiting += size - self._bytes
        self._bytes = size
        if grown and self._gate.waiting > self._gate.max_waiting:
            raise self._gate.too_much_waits()

    def release(self) -> None:
        """What the request brought has been read; nothing of it counts from now on. May be called twice."""
        self.set(0)
        self._released = True
