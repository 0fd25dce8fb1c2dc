"""uvicorn's WebSocket protocol with limits that act while bytes arrive."""

from __future__ import annotations

import json
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from light_tts.server.connections.gate import Gate, Refusal, Upload

PIECE_BYTES = 64  # counted for each piece of a message beside its payload, which may be empty
LINGER_SECONDS = 2.0  # what a client has to read why its connection ends


class LimitedWebSocket(WebSocketsSansIOProtocol):
    """A message above --max_upload_mb is refused with close code 1009 as soon as its size is known; one that
    would take more memory than is left for all of them, with 1013. No compression: it would let a few bytes
    become many, and speech does not become smaller by it."""

    def __init__(self, *args: Any, gate: Gate, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate = gate
        self._upload = Upload(gate)
        self._pieces = 0  # bytes of the message that arrives
        self._untaken = 0  # of messages that the application has not dealt with
        self._failed = False
        self.conn = _Connection(max_size=gate.max_body, logger=self.conn.logger)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.leave(self)
        self._upload.release()
        super().connection_lost(exc)

    def make_room(self) -> None:
        """Never idle: the session itself ends one in which nothing is said."""

    def data_received(self, data: bytes) -> None:
        if self._failed:
            return
        super().data_received(data)
        if self.handshake_initiated:
            self._count()
        else:  # the request, which comes as one, is none to this library
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def _count(self) -> None:
        try:
            self._upload.set(len(self.conn.reader.buffer) + self._pieces + self._untaken)
            if self._pieces > 2 * self._gate.max_body:
                self._fail(Refusal(413, "a message comes in too many pieces"), CloseCode.MESSAGE_TOO_BIG)
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
        """Who asks for the next message has dealt with those before."""
        if self.queue.empty():
            self._untaken = 0
            self._count()
        return await super().receive()

    # -- the end

    def handle_parser_exception(self) -> None:
        """As uvicorn does it, but let the client read why."""
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
        if self.transport.can_write_eof():  # not with TLS
            self.transport.write_eof()
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        if self.close_timer is None:  # keeps uvicorn from closing when the application ends
            self.close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)


class _Connection(ServerProtocol):
    """Says why before it fails: as a message like any other error of the session."""

    def explain_and_fail(self, refusal: Refusal, code: CloseCode) -> None:
        if self.state is OPEN:
            error = {"error": refusal.message, "status": refusal.status}
            self.send_text(json.dumps(error).encode())
        super().fail(code, refusal.message.encode()[:120].decode(errors="ignore"))

    def fail(self, code: CloseCode | int, reason: str = "") -> None:
        if code == CloseCode.MESSAGE_TOO_BIG:
            refusal = Refusal(413, f"a message is above {self.max_message_size / 2**20:g} MiB")
            self.explain_and_fail(refusal, code)
        else:
            super().fail(code, reason)
