"""Middleware for Ray Serve's proxy: repeats a request whose replica was killed before the response began.

Serve imports it from RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, see `ray_serve.RETRY`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.middleware import Middleware

ATTEMPTS = 3
PAUSE = 0.1  # seconds before each further attempt; by then Serve no longer chooses the killed replica
LEAVING = ("http.disconnect", "websocket.disconnect")
log = logging.getLogger("ray.serve")  # the proxy's own log


def middlewares() -> list[Middleware]:
    """Return what Serve shall put around the app of its proxy."""
    return [Middleware(Retry)]


class Retry:
    """Calls `app`, that of Serve's proxy, again if it has ended without sending anything, as it does when the
    process of Ray that had the request has died. At most ATTEMPTS times in all; the web server then answers
    500. A response, or a WebSocket, that has begun is never repeated, nor is a request whose client has left.
    The log names each repetition, and each response that was cut off.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        for attempt in range(ATTEMPTS):
            if attempt:
                log.warning("%s ended before its response began: trying again", scope["path"])
                await asyncio.sleep(PAUSE)
            await self._app(dict(scope), exchange.replay(), exchange.send)
            if exchange.begun or exchange.client_left:
                break
        if exchange.begun and not exchange.ended and not exchange.client_left:
            log.warning("%s was cut off after its response had begun", scope["path"])


class _Exchange:
    """Keeps what the client has sent until the response begins."""

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive = receive
        self._send = send
        self._kept: list[Any] = []
        self.begun = False
        self.ended = False  # with its last message
        self.client_left = False

    def replay(self) -> Any:
        """Return a `receive` that begins with the messages kept so far."""
        again = iter(list(self._kept))

        async def receive() -> Any:
            for message in again:
                return message
            message = await self._receive()
            self.client_left = self.client_left or message["type"] in LEAVING
            if not self.begun:
                self._kept.append(message)
            return message

        return receive

    async def send(self, message: Any) -> None:
        self.begun = True
        self._kept.clear()
        body = message["type"] == "http.response.body" and not message.get("more_body", False)
        self.ended = self.ended or body or message["type"] == "websocket.close"
        await self._send(message)
