"""uvicorn's HTTP protocol with limits that act while bytes arrive, before anything is kept of them."""

from __future__ import annotations

import json
import socket
import struct
from asyncio import TimerHandle
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from light_tts.server.connections.gate import STATUS_PATHS, Gate, Refusal, Upload

MAX_URL = 8 * 2**10  # bytes; the WebSocket library takes no longer one either
MAX_FIELD = 8 * 2**10  # bytes of one header field
MAX_HEAD = 32 * 2**10  # bytes of all
MAX_FIELDS = 100
MAX_PIPELINED = 8  # requests that wait for the answer of the one before
LINGER_SECONDS = 2.0  # what a client has to read the answer before its connection is closed
PROBE_SECONDS = 0.5  # until a client that has stopped sending is asked whether it is still there
_TCP_CLOSE = 7  # state of a connection that the other side has reset


class LimitedHttp(HttpToolsProtocol):
    """A connection that speaks HTTP until it ends or becomes a WebSocket.

    Too long a URL gets 414, too large a header 431, too large a body 413; a body that would take more memory
    than is left for all of them, 429; a header or body that does not come, 408. Each ends the connection.
    """

    def __init__(self, *args: Any, gate: Gate, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate = gate
        self._deaf = False  # what still comes is not looked at
        self._timer: TimerHandle | None = None  # for what is waited for: a header, more of a body, the end
        self._begun = False  # some of a header has come, but not all
        self._refusal: Refusal | None = None
        self._progress = False  # the parser has handed something on
        self._unseen = 0  # bytes that it has taken since it last did
        self._head = self._fields = self._body = 0  # of the message that arrives
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
        self._deaf = True
        self.transport.close()

    def end_with_answer(self) -> None:
        """Closes after the last answer that is under way; where none is, after the next (`gate.leaving`) or
        when idle for too long."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def data_received(self, data: bytes) -> None:
        if self._deaf:
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

    def eof_received(self) -> bool:
        """The client sends no more. Where it has sent a whole request it still gets its answer (True: the
        connection stays)."""
        cycle = self.cycle
        if self._deaf or cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        self.loop.call_later(PROBE_SECONDS, self._probe, True)
        return True

    def _probe(self, first: bool) -> None:
        """A client that has gone looks like one that has only stopped sending, until it is sent something: so
        it is told to continue (any HTTP/1.1 client ignores that); if it has gone, its system answers with a
        reset."""
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

    # -- what the parser finds

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
        """Also for what follows a chunked body."""
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
                raise Refusal(400, f"more than {MAX_PIPELINED} requests wait for their answers")
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
        """Whether the message asks for a WebSocket: it has no cycle."""
        return self.parser.should_upgrade() and self._should_upgrade()

    def _stop(self, refusal: Refusal) -> None:
        """Have the parser end, which says itself only that something went wrong."""
        self._refusal = refusal
        raise refusal

    def _watch_unseen(self, size: int) -> None:
        """The parser keeps a field until it is complete."""
        self._unseen = 0 if self._progress else self._unseen + size
        if self._unseen > MAX_FIELD:
            raise _header_too_large()

    # -- time

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_head(self) -> None:
        """Bytes between two requests begin the next one."""
        if self._timer is None and not self._deaf and (self.cycle is None or self.cycle.response_complete):
            self._wait(self._gate.header_timeout, self._head_is_late)

    def _head_is_late(self) -> None:
        seconds = self._gate.header_timeout
        if self._begun:
            self._refuse(Refusal(408, f"the request's header did not arrive within {seconds:g} s"))
        else:
            self.transport.close()

    def _check_body(self) -> None:
        """Whether something of the body has come lately; while the application reads nothing, nothing can."""
        seconds = self._gate.body_timeout
        rest = seconds if self.flow.read_paused else self._last_byte + seconds - self.loop.time()
        if rest > 0:
            self._wait(rest, self._check_body)
        else:
            self._refuse(Refusal(408, f"nothing of the request's body came for {seconds:g} s"))

    # -- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.transport = _AnswerTransport(self, cycle)
        super()._start_asgi_task(cycle, partial(self._run, cycle, app))

    async def _run(self, cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def send_and_close(message: Any) -> None:
            if cycle.more_body:  # answered before all of it was read: the rest is not wanted
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
        """Answer, and end the connection. In the middle of another answer: only end it."""
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if self.pipeline or (answering and (cycle.response_started or not cycle.more_body)):
            self._deaf = True
            self.transport.close()
            return
        if answering:  # for the application the client has gone
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
        """End the connection once the client has read what was written: closed at once, with input unread,
        it would lose that."""
        self._deaf = True
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self._gate.idle(self)
        if not self.transport.is_closing():
            if self.transport.can_write_eof():  # not with TLS
                self.transport.write_eof()
            self.flow.resume_reading()
            self._wait(LINGER_SECONDS, self.transport.abort)

    def _become_websocket(self) -> None:
        self._stop_waiting()
        self.handle_websocket_upgrade()
        successor = self.transport.get_protocol()
        self._deaf = True
        self._gate.replace(self, successor)


class _AnswerTransport:
    """The transport as one answer sees it: closing it lets the client read to the end."""

    def __init__(self, protocol: LimitedHttp, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        if self._cycle.more_body and self._cycle.response_complete:
            self._protocol.linger()
        else:
            self._protocol.transport.close()


def _upload(cycle: RequestResponseCycle) -> Upload:
    return cycle.scope["state"]["upload"]


def _header_too_large() -> Refusal:
    return Refusal(
        431, f"the request's header is above {MAX_HEAD} bytes, or one field of it above {MAX_FIELD}"
    )
