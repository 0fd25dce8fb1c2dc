"""Typed queues over ZeroMQ; the rest of the code never touches a socket.

Every process has one inbox (a bound PULL socket) that receives all its messages, and one outbox with a PUSH
connection to each address it sends to. Nothing polls: an idle process sleeps in `recv`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import threading
import time
import zlib
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from light_tts.server.core import messages, wire

log = logging.getLogger("light_tts.channel")

_ZEROS = bytes(1 << 15)


def _context() -> zmq.Context[zmq.SyncSocket]:
    """The one context of this process."""
    context: zmq.Context[zmq.SyncSocket] = zmq.Context.instance()
    return context


class Inbox:
    """Blocking inbox of a stage process. Only `wake` may be called from another thread."""

    def __init__(self, address: str) -> None:
        self._socket = _context().socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(address)
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # keeps `wake` from writing to a descriptor that was closed and reused
        self._closing = threading.Lock()
        self._held: list[messages.Message] = []
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_fd, select.POLLIN)

    def wait(self, timeout: float | None = None, awake: float = 0.0) -> list[messages.Message]:
        """Return all messages that have arrived. Blocks until there is one, `wake` is called, or `timeout`
        seconds have passed (0: do not block). awake: of these, do not sleep in the first so many seconds, see
        `can_wait_awake`."""
        arrived = self._take_all()
        if arrived or timeout == 0:
            return arrived
        if awake > 0:
            awake = awake if timeout is None else min(awake, timeout)
            self._wait_awake(awake)
            timeout = None if timeout is None else timeout - awake
        events = dict(self._poller.poll(None if timeout is None else int(timeout * 1000)))
        if self._wake_fd in events:
            os.eventfd_read(self._wake_fd)
        return self._take_all() if self._socket in events else []

    def _wait_awake(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._poller.poll(0):
            zlib.crc32(_ZEROS)  # some 10 us without the interpreter lock, so that other threads can run

    def wake(self) -> None:
        """Make the current or next `wait` return. Thread-safe; does nothing after `close`."""
        with self._closing:
            if not self._socket.closed:
                os.eventfd_write(self._wake_fd, 1)

    def put_back(self, held: list[messages.Message]) -> None:
        """Put messages back so that the next `wait` returns them first."""
        self._held = held

    def _take_all(self) -> list[messages.Message]:
        arrived, self._held = self._held, []
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return arrived
            arrived.append(wire.decode([frame.buffer for frame in frames]))

    def close(self) -> None:
        with self._closing:
            if not self._socket.closed:
                self._socket.close()
                os.close(self._wake_fd)


class CallbackInbox:
    """Inbox of an HTTP worker: passes each message to `handle` in the event loop as soon as it arrives. An
    exception that this raises is logged."""

    def __init__(self, address: str) -> None:
        self._socket = _context().socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(address)
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._fileno = int(self._socket.fd)
        self._handle: Callable[[messages.Message], None] | None = None

    def listen(self, handle: Callable[[messages.Message], None]) -> None:
        """Start. To be called in the event loop, once."""
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        # It becomes readable only when a message arrives after all others have been taken.
        self._loop.add_reader(self._fileno, self._take_all)
        self._loop.call_soon(self._take_all)

    def _take_all(self) -> None:
        while self._handle is not None:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._handle(wire.decode([frame.buffer for frame in frames]))
            except Exception:
                log.exception("failed to handle a message")

    def close(self) -> None:
        if not self._socket.closed:
            if self._handle is not None:
                self._handle = None
                self._loop.remove_reader(self._fileno)
            self._socket.close()


class AsyncInbox:
    """Inbox of the supervisor, for asyncio."""

    def __init__(self, address: str) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(address)
        self.address = self._socket.get_string(zmq.LAST_ENDPOINT)

    async def recv(self) -> messages.Message:
        frames = await self._socket.recv_multipart(copy=False)
        return wire.decode([frame.buffer for frame in frames])

    def close(self) -> None:
        if not self._socket.closed:
            self._socket.close()


class Outbox:
    """Sends messages to addresses, connecting on first use and keeping the connection. Thread-safe and
    non-blocking: messages the receiver has not read yet are queued in memory, which admission control bounds.
    """

    def __init__(self) -> None:
        self._sockets: dict[str, zmq.SyncSocket] = {}
        self._lock = threading.Lock()

    def send(self, address: str, message: messages.Message) -> None:
        frames = wire.encode(message)
        with self._lock:
            socket = self._sockets.get(address)
            if socket is None:
                socket = _context().socket(zmq.PUSH)
                socket.set_hwm(0)
                socket.linger = 0
                socket.reconnect_ivl = 20
                socket.connect(address)
                self._sockets[address] = socket
            socket.send_multipart(frames, zmq.NOBLOCK)

    def forget(self, address: str, linger: float = 0.0) -> None:
        """Close the connection to `address`, dropping unsent messages after `linger` seconds."""
        with self._lock:
            socket = self._sockets.pop(address, None)
            if socket is not None:
                socket.close(linger=int(linger * 1000))

    def close(self, linger: float = 0.0) -> None:
        for address in list(self._sockets):
            self.forget(address, linger)


class Peers:
    """The other stage processes as this process knows them. Updated by the supervisor's messages; the only
    place that maps (stage, index) to an address."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.stages: dict[tuple[str, int], messages.StageInfo] = {}
        self.draining = False

    def apply(self, message: messages.Message) -> None:
        """Handle Topology, StageDown, StageUp, StageSilent, StageGivenUp, WorkerGone or Drain; ignore other
        messages."""
        match message:
            case messages.Topology(stages=stages, draining=draining):
                self.stages = {(info.stage, info.index): info for info in stages}
                self.draining = draining
            case messages.StageDown(next=following):
                old = self.stages.get((following.stage, following.index))
                if old is not None and old.address != following.address:
                    self.outbox.forget(old.address)
                self.stages[following.stage, following.index] = following
            case messages.StageUp(stage=info) | messages.StageSilent(stage=info):
                self.stages[info.stage, info.index] = info
            case messages.StageGivenUp(stage=stage, index=index, reason=reason):
                info = self.stages[stage, index]
                self.stages[stage, index] = msgspec.structs.replace(info, state="failed", reason=reason)
            case messages.WorkerGone(address=address):
                self.outbox.forget(address)
            case messages.Drain():
                self.draining = True

    def of(self, stage: str) -> list[messages.StageInfo]:
        """Return all processes of a stage, ordered by index."""
        return [self.stages[key] for key in sorted(self.stages) if key[0] == stage]

    def send(self, stage: str, index: int, message: messages.Message) -> None:
        """Send to a stage process. If it is being restarted, the message waits for the next incarnation."""
        self.outbox.send(self.stages[stage, index].address, message)

    def broadcast(self, message: messages.Message) -> None:
        """Send to every stage process."""
        for info in self.stages.values():
            self.outbox.send(info.address, message)
