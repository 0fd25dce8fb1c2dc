"""How a new server takes over the port of a running one (`--replace`): it receives the running server's
listening socket, so no connection is refused or lost in between.

    new: connects to `RunDir.takeover` of the running server
    old: sends the listening socket; from now on other servers that ask get nothing
    new: loads its models, starts its HTTP workers, then sends SERVING
    old: accepts no more connections, finishes its requests, exits

If the new server ends before it has sent SERVING, the old one simply continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

from light_tts.server.core.rundir import PREFIX, SHARED_MEMORY, RunDir
from light_tts.server.core.settings import Settings

SERVING = b"serving"
ANSWER_SECONDS = 5.0  # time for the running server to send its socket


class ListenError(Exception):
    """The server cannot use the port; the message names the flags."""


def listening_socket(config: Settings) -> tuple[socket.socket, socket.socket | None]:
    """Return the socket for --host and --port. Normally that is a new one, bound but not listening, and None.
    With --replace it is the socket of the running server, and the connection to that server. Raises
    ListenError."""
    if config.replace:
        running = _running_server(config)
        if running is not None:
            return _receive(running, config), running
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ListenError(f"--host {config.host} --port {config.port}: {error}") from error
    return bound, None


def _running_server(config: Settings) -> socket.socket | None:
    """Return a connection to this user's server on the port, or None if there is none that can be
    replaced.
    """
    for shm in SHARED_MEMORY.glob(f"{PREFIX}{config.port}-*"):
        run_dir = RunDir.of_shared_memory(shm, config.zmq_mode)
        if run_dir is None:
            continue
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(ANSWER_SECONDS)
        try:
            connection.connect(str(run_dir.takeover))
            return connection
        except OSError:  # it is starting, stopping, dead or owned by another user
            connection.close()
    return None


def _receive(running: socket.socket, config: Settings) -> socket.socket:
    """Return the listening socket of the running server. Raises ListenError."""
    where = f"--replace: the server on port {config.port}"
    try:
        _, descriptors, _, _ = socket.recv_fds(running, 1, 1)
    except OSError as error:
        raise ListenError(f"{where} does not answer: {error}") from error
    if not descriptors:
        raise ListenError(f"{where} is already being replaced by another one")
    listener = socket.socket(fileno=descriptors[0])
    listener.set_inheritable(False)
    host = listener.getsockname()[0]
    with contextlib.suppress(OSError):
        wanted = socket.getaddrinfo(config.host, config.port, listener.family, socket.SOCK_STREAM)
        if host in {address[0] for *_, address in wanted}:
            return listener
    listener.close()
    raise ListenError(f"{where} listens on {host}, not on --host {config.host}: stop it, or give that --host")


class Takeover:
    """The supervisor's side of a takeover, both in the new server and later in the one that is replaced.

    `listener`: the socket that is passed on; `running`: the connection to the server that this one replaces.
    `on_replaced()` is called once another server serves in place of this one.
    """

    def __init__(
        self,
        path: Path,
        listener: socket.socket,
        running: socket.socket | None,
        on_replaced: Callable[[], None],
    ) -> None:
        self._path = path
        self._listener = listener
        self._running = running
        self._on_replaced = on_replaced
        self._offer: asyncio.Server | None = None
        self._successor = False  # another server has been sent the socket and is still connected

    async def serving(self) -> None:
        """The HTTP workers are serving: notify the server that is being replaced, and allow a later one to
        replace this one."""
        if self._offer is not None:
            return
        self._offer = await asyncio.start_unix_server(self._hand_over, self._path)
        if self._running is not None:
            with contextlib.suppress(OSError):  # it has exited on its own
                self._running.sendall(SERVING)
            self._running.close()

    def close(self) -> None:
        """Stop accepting takeover requests."""
        if self._offer is not None:
            self._offer.close()
            self._path.unlink(missing_ok=True)

    async def _hand_over(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._successor:
            writer.close()
            return
        self._successor = True
        try:
            descriptor = writer.get_extra_info("socket").fileno()
            with socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                socket.send_fds(connection, [b"\0"], [self._listener.fileno()])
            if await reader.read(len(SERVING)) == SERVING:
                self.close()
                self._on_replaced()
        except OSError:
            pass  # it has disconnected again
        finally:
            self._successor = False
            writer.close()
