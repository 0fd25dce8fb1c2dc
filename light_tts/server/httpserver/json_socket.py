"""A WebSocket on which JSON objects come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import MutableMapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import parse_json


class JsonSocket:
    """`idle`: seconds that the client may say nothing."""

    def __init__(self, websocket: WebSocket, idle: float) -> None:
        self.websocket = websocket
        self._idle = idle

    async def receive_message(self, may_be_silent: bool = False) -> MutableMapping[str, Any]:
        """`may_be_silent`: the client may, for as long as it likes. Raises WebSocketDisconnect; Silence."""
        # Not wait_for: before Python 3.12 it forgets that it was cancelled if a message comes just then.
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
        """Raises WebSocketDisconnect; Silence; RequestError (400): not a JSON object."""
        message = await self.receive_message()
        if message.get("text") is None:
            raise RequestError(400, "a JSON text message was expected, not binary data")
        fields = parse_json(message["text"])
        if not isinstance(fields, dict):
            raise RequestError(400, "a JSON object was expected")
        return fields

    async def send(self, message: dict[str, Any] | bytes) -> None:
        """Raises WebSocketDisconnect."""
        try:
            if isinstance(message, bytes):
                await self.websocket.send_bytes(message)
            else:
                await self.websocket.send_json(message)
        except (RuntimeError, OSError):  # it is closed already
            raise WebSocketDisconnect(1006) from None

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """The reason of a close frame holds at most 123 bytes."""
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
            await self.websocket.close(code, reason.encode()[:120].decode(errors="ignore"))


class Silence(RequestError):
    """Nothing has come for too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(408, f"nothing came from the client for {seconds:g} s")


async def until_first(*tasks: asyncio.Task[None]) -> None:
    """Waits until one of them has ended, ends the others, and raises what it raised."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
