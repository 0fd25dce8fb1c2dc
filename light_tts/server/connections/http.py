"""uvicorn's HTTP protocol with limits that are enforced while bytes arrive, before any are stored."""

from __future__ import annotations

import json
import socket
import struct
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from light_tts.server.connections.gate import STATUS_PATHS, Gate, Refusal, Upload
from light_tts.server.connections.websocket import LimitedWebSocket

MAX_URL = 8 * 2**10  # bytes; the WebSocket library has the same limit
MAX_FIELD = 8 * 2**10  # bytes per header field
MAX_HEAD = 32 * 2**10  # bytes of the whole header
MAX_FIELDS = 100
MAX_PIPELINED = 8  # requests waiting for the response to an earlier one
LINGER_SECONDS = 2.0  # time for a client to read the response before its connection is closed
PROBE_SECONDS = 0.5  # delay before probing whether a client that has stopped sending is still there
_TCP_CLOSE = 7  # state of a connection reset by the peer


class LimitedHttp(HttpToolsProtocol):
    """A connection that speaks HTTP until it ends or becomes a WebSocket.

    Responds 414 to a URL that is too long, 431 to a header that is too large, 413 to a body that is too
    large, 429 to a body that would exceed the memory left for all bodies, and 408 to a header or body that
    does not arrive in time. Each of these closes the connection.
    """

    def __init__(self, *args: Any, gate: Gate, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate = gate
        self._ignoring_input = False  # further input is ignored
        self._timer: TimerHandle | None = None  # for whichever is awaited: a header, more of a body, the end
        self._begun = False  # part of a header has arrived
        self._refusal: Refusal | None = None
        self._progress = False  # the parser has reported something since the last check
        self._unseen = 0  # bytes fed to the parser since its last report
        self._head = self._fields = self._body = 0  # sizes of the message being received
        self._last_byte = 0.0

    # -- the connection

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._gate.enter(self)
        self._wait(self._gate.header_timeout, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.leave(self)
        self._stop_waiting()
        for cycle, _ in self.pipeline:
            _upload(cycle).release()
        super().connection_lost(exc)

    def make_room(self) -> None:
        self._ignoring_input = True
        self.transport.close()

    def end_with_answer(self) -> None:
        """Close after the last response in progress. If there is none, close after the next one
        (`gate.leaving`) or after the idle timeout."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def data_received(self, data: bytes) -> None:
        if self._ignoring_input:
            return
        self._unset_keepalive_if_required()
        self._last_byte = self.loop.time()
        self._progress = False
        try:
            self.parser.feed_data(data)
            self._watch_unseen(len(data))
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self._become_websocket()
            else:
                self._unsupported_upgrade_warning()
        except Refusal as refusal:
            self._refuse(refusal)
        except httptools.HttpParserError:
            self._refuse(self._refusal or Refusal(400, "this is not HTTP"))
        self._watch_head()

    def eof_received(self) -> bool:  # type: ignore[override]  # as in asyncio; uvicorn declares None
        """The client has closed its sending side. If it has sent a complete request, it still gets its
        response (True keeps the connection open)."""
        cycle = self.cycle
        if self._ignoring_input or cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        self.loop.call_later(PROBE_SECONDS, self._probe, True)
        return True

    def _probe(self, first: bool) -> None:
        """Check whether a client that has stopped sending is gone. Both cases look the same until something
        is sent, so send "100 Continue", which any HTTP/1.1 client ignores; the system of a client that is
        gone answers with a reset."""
        cycle = self.cycle
        if self.transport.is_closing() or cycle.response_complete:
            return
        if self._is_reset():
            self.transport.abort()
            return
        if (
            first
            and not cycle.response_started
            and not self.pipeline
            and cycle.scope["http_version"] == "1.1"
        ):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.loop.call_later(PROBE_SECONDS / 2, self._probe, False)

    def _is_reset(self) -> bool:
        connection = self.transport.get_extra_info("socket")
        if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return struct.unpack("B", state)[0] == _TCP_CLOSE

    # -- parser callbacks

    def on_message_begin(self) -> None:
        self._progress = self._begun = True
        self._head = self._fields = self._body = 0
        super().on_message_begin()
        self.scope["state"]["upload"] = Upload(self._gate)

    def on_url(self, url: bytes) -> None:
        self._progress = True
        super().on_url(url)
        if len(self.url) > MAX_URL:
            self._stop(Refusal(414, f"the URL is above {MAX_URL} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called for header fields and for the trailer fields of a chunked body."""
        self._progress = True
        self._fields += 1
        self._head += len(name) + len(value)
        if self._fields > MAX_FIELDS:
            self._stop(Refusal(431, f"the request has more than {MAX_FIELDS} header fields"))
        if len(name) + len(value) > MAX_FIELD or self._head > MAX_HEAD:
            self._stop(_header_too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._progress = True
        self._begun = False
        self._stop_waiting()
        self._gate.busy(self)
        try:
            if len(self.pipeline) >= MAX_PIPELINED:
                raise Refusal(400, f"more than {MAX_PIPELINED} requests are waiting for their responses")
            if self._gate.full and self.url.partition(b"?")[0].decode("latin-1") not in STATUS_PATHS:
                raise Refusal(503, "too many connections are open; try again later", retry_after=1)
            for name, value in self.headers:
                if name == b"content-length" and value.isdigit():
                    self._gate.check_announced(int(value))
        except Refusal as refusal:
            self._stop(refusal)
        super().on_headers_complete()
        if not self._upgrading():
            if self._gate.leaving:
                self.cycle.keep_alive = False
            self._wait(self._gate.body_timeout, self._check_body)

    def on_chunk_header(self) -> None:
        self._progress = True

    def on_body(self, body: bytes) -> None:
        self._progress = True
        if not self._upgrading() and not self.cycle.response_complete:
            self._body += len(body)
            try:
                if self._body > self._gate.max_body:
                    self._gate.check_announced(self._body)
                _upload(self.cycle).set(self._body)
            except Refusal as refusal:
                self._stop(refusal)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._progress = True
        self._stop_waiting()
        super().on_message_complete()

    def _upgrading(self) -> bool:
        """Whether the message requests a WebSocket upgrade; it then has no cycle."""
        return self.parser.should_upgrade() and self._should_upgrade()

    def _stop(self, refusal: Refusal) -> None:
        """Make the parser stop; its own exception only says that something went wrong."""
        self._refusal = refusal
        raise refusal

    def _watch_unseen(self, size: int) -> None:
        """Limit the bytes that the parser buffers until a field is complete."""
        self._unseen = 0 if self._progress else self._unseen + size
        if self._unseen > MAX_FIELD:
            raise _header_too_large()

    # -- timeouts

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_head(self) -> None:
        """Start the header timeout. Bytes between two requests count as the start of the next one."""
        if (
            self._timer is None
            and not self._ignoring_input
            and (self.cycle is None or self.cycle.response_complete)
        ):
            self._wait(self._gate.header_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        seconds = self._gate.header_timeout
        if self._begun:
            self._refuse(Refusal(408, f"the request's header did not arrive within {seconds:g} s"))
        else:
            self.transport.close()

    def _check_body(self) -> None:
        """Time out if no part of the body has arrived lately, unless the application has paused reading."""
        seconds = self._gate.body_timeout
        rest = seconds if self.flow.read_paused else self._last_byte + seconds - self.loop.time()
        if rest > 0:
            self._wait(rest, self._check_body)
        else:
            self._refuse(Refusal(408, f"no data of the request's body arrived for {seconds:g} s"))

    # -- responses

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.transport = _AnswerTransport(self, cycle)
        super()._start_asgi_task(cycle, partial(self._run, cycle, app))

    async def _run(self, cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def send_and_close(message: Any) -> None:
            if cycle.more_body:  # the response came before the whole body was read; the rest is discarded
                cycle.keep_alive = False
            await send(message)

        try:
            await app(scope, receive, send_and_close)
        finally:
            _upload(cycle).release()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline:
            self._gate.idle(self)

    def _refuse(self, refusal: Refusal) -> None:
        """Send the response and close the connection, or only close it if another response is in progress."""
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if self.pipeline or (answering and (cycle.response_started or not cycle.more_body)):
            self._ignoring_input = True
            self.transport.close()
            return
        if answering:  # looks like a disconnected client to the application
            _upload(cycle).release()
            cycle.disconnected = True
            cycle.message_event.set()
        body = json.dumps({"message": refusal.message}).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if refusal.retry_after is not None:
            headers.append((b"retry-after", str(refusal.retry_after).encode()))
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[refusal.status] + lines + b"\r\n" + body)
        self.linger()

    def linger(self) -> None:
        """Close the connection once the client has read what was written. Closing at once, with input unread,
        would discard it."""
        self._ignoring_input = True
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self._gate.idle(self)
        if not self.transport.is_closing():
            if self.transport.can_write_eof():  # not supported by TLS
                self.transport.write_eof()
            self.flow.resume_reading()
            self._wait(LINGER_SECONDS, self.transport.abort)

    def _become_websocket(self) -> None:
        self._stop_waiting()
        self.handle_websocket_upgrade()
        successor = self.transport.get_protocol()
        assert isinstance(successor, LimitedWebSocket)  # HttpWorker has set it so
        self._ignoring_input = True
        self._gate.replace(self, successor)


class _AnswerTransport(Transport):
    """The transport as seen by one response: closing it lets the client read everything first."""

    def __init__(self, protocol: LimitedHttp, cycle: RequestResponseCycle) -> None:
        super().__init__()
        self._protocol = protocol
        self._cycle = cycle

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        return self._protocol.transport.is_closing()

    def close(self) -> None:
        if self._cycle.more_body and self._cycle.response_complete:
            self._protocol.linger()
        else:
            self._protocol.transport.close()


def _upload(cycle: RequestResponseCycle) -> Upload:
    return cycle.scope["state"]["upload"]


def _header_too_large() -> Refusal:
    return Refusal(
        431, f"the request's header is above {MAX_HEAD} bytes, or one of its fields is above {MAX_FIELD}"
    )
