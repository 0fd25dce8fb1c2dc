"""uvicorn's WebSocket protocol with limits that are enforced while bytes arrive."""

from __future__ import annotations

import json
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame
from websockets.protocol import OPEN
from websockets.server import ServerProtocol
from websockets.typing import LoggerLike

from light_tts.server.connections.gate import Gate, Refusal, Upload

PIECE_BYTES = 64  # counted for each frame of a message in addition to its payload, which may be empty
LINGER_SECONDS = 2.0  # time for a client to read why its connection ends


class LimitedWebSocket(WebSocketsSansIOProtocol):
    """Closes with code 1009 as soon as a message is known to exceed --max_upload_mb, and with 1013 if a
    message would exceed the memory left for all of them. No compression: a few bytes could expand to many,
    and audio hardly compresses."""

    def __init__(self, *args: Any, gate: Gate, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate = gate
        self._upload = Upload(gate)
        self._pieces = 0  # bytes of the message being received
        self._untaken = 0  # bytes of messages that the application has not processed
        self._failed = False
        self.conn: _Connection = _Connection(max_size=gate.max_body, logger=self.conn.logger)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.leave(self)
        self._upload.release()
        super().connection_lost(exc)

    def make_room(self) -> None:
        """Does nothing: a WebSocket is never idle, and the session itself closes a silent one."""

    def data_received(self, data: bytes) -> None:
        if self._failed:
            return
        super().data_received(data)
        if self.handshake_initiated:
            self._count()
        else:  # the library has no event for the request, which arrives as a whole
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def _count(self) -> None:
        try:
            self._upload.set(len(self.conn.reader.buffer) + self._pieces + self._untaken)
            if self._pieces > 2 * self._gate.max_body:
                self._fail(Refusal(413, "a message has too many fragments"), CloseCode.MESSAGE_TOO_BIG)
        except Refusal as refusal:
            self._fail(refusal, CloseCode.TRY_AGAIN_LATER)

    def _fail(self, refusal: Refusal, code: CloseCode) -> None:
        self.conn.explain_and_fail(refusal, code)
        self.handle_parser_exception()

    # -- messages

    def handle_text(self, event: Frame) -> None:
        self._pieces = len(event.data) + PIECE_BYTES
        super().handle_text(event)

    def handle_bytes(self, event: Frame) -> None:
        self._pieces = len(event.data) + PIECE_BYTES
        super().handle_bytes(event)

    def handle_cont(self, event: Frame) -> None:
        self._pieces += len(event.data) + PIECE_BYTES
        super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        self._untaken += self._pieces
        self._pieces = 0
        super().send_receive_event_to_app()

    async def receive(self) -> Any:
        """Asking for the next message means that the earlier ones have been processed."""
        if self.queue.empty():
            self._untaken = 0
            self._count()
        return await super().receive()

    # -- the end

    def handle_parser_exception(self) -> None:
        """Like uvicorn's, but gives the client time to read the reason."""
        close = self.conn.close_sent
        if self._failed or close is None:
            return
        self._failed = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": close.code, "reason": close.reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.frames = []
        self.conn.reader.discard()
        self._upload.release()
        self.stop_keepalive()
        if self.transport.can_write_eof():  # not supported by TLS
            self.transport.write_eof()
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        if self.close_timer is None:  # keeps uvicorn from closing the connection when the application ends
            self.close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)


class _Connection(ServerProtocol):
    """Sends the reason before it fails, as an error message like any other of the session."""

    def __init__(self, max_size: int, logger: LoggerLike) -> None:
        super().__init__(max_size=max_size, logger=logger)
        self._max_size = max_size

    def explain_and_fail(self, refusal: Refusal, code: CloseCode) -> None:
        if self.state is OPEN:
            error = {"error": refusal.message, "status": refusal.status}
            self.send_text(json.dumps(error).encode())
        super().fail(code, refusal.message.encode()[:120].decode(errors="ignore"))

    def fail(self, code: CloseCode | int, reason: str = "") -> None:
        if code == CloseCode.MESSAGE_TOO_BIG:
            refusal = Refusal(413, f"a message is above {self._max_size / 2**20:g} MiB")
            self.explain_and_fail(refusal, CloseCode.MESSAGE_TOO_BIG)
        else:
            super().fail(code, reason)
