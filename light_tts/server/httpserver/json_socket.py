"""A WebSocket with JSON messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import MutableMapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import parse_json


class JsonSocket:
    """A WebSocket that receives JSON objects. `idle`: maximum seconds without a message from the client."""

    def __init__(self, websocket: WebSocket, idle: float) -> None:
        self.websocket = websocket
        self._idle = idle

    async def receive_message(self, may_be_silent: bool = False) -> MutableMapping[str, Any]:
        """Return the next message. `may_be_silent`: without the idle limit. Raises WebSocketDisconnect or
        Silence."""
        # Not wait_for: before Python 3.12 it loses a cancellation if a message arrives at the same moment.
        receiving = asyncio.ensure_future(self.websocket.receive())
        try:
            await asyncio.wait({receiving}, timeout=None if may_be_silent else self._idle)
            if not receiving.done():
                raise Silence(self._idle)
            message = receiving.result()
        finally:
            receiving.cancel()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        return message

    async def receive(self) -> dict[str, Any]:
        """Return the next JSON object. Raises WebSocketDisconnect, Silence, or RequestError (400) for
        anything else."""
        message = await self.receive_message()
        if message.get("text") is None:
            raise RequestError(400, "expected a JSON text message, not binary data")
        fields = parse_json(message["text"])
        if not isinstance(fields, dict):
            raise RequestError(400, "expected a JSON object")
        return fields

    async def send(self, message: dict[str, Any] | bytes) -> None:
        """Send a message as JSON, or bytes as binary. Raises WebSocketDisconnect."""
        try:
            if isinstance(message, bytes):
                await self.websocket.send_bytes(message)
            else:
                await self.websocket.send_json(message)
        except (RuntimeError, OSError):  # already closed
            raise WebSocketDisconnect(1006) from None

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close the connection. The reason is cut to the 123 bytes that a close frame can hold."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
            await self.websocket.close(code, reason.encode()[:120].decode(errors="ignore"))


class Silence(RequestError):
    """The client was silent for too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(408, f"the client sent nothing for {seconds:g} s")


async def until_first(*tasks: asyncio.Task[None]) -> None:
    """Wait until one of the tasks has ended, cancel the others, and re-raise its exception if it failed."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
