"""ASGI app that forwards requests and WebSockets to a server and streams back its responses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

CONNECT_SECONDS = 5.0
# Headers of a single connection, or written anew for the next one (RFC 9110, 7.6.1).
HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
WEBSOCKET_HANDSHAKE = (b"host", b"content-length", b"sec-websocket-")
CLOSE_BY_ERROR = 1011

Fields = list[tuple[bytes, bytes]]
Piece = tuple[int, Fields] | bytes  # of a response: status and headers first, then the body
log = logging.getLogger("light_tts.scale")


class NotBegun(Exception):
    """The server is gone before any of the response arrived; the request may be sent to another one."""


@dataclass(frozen=True)
class Request:
    """An HTTP request. `target`: path and query, as in the request line."""

    method: str
    target: bytes
    headers: Fields
    body: bytes


Elsewhere = Callable[[Request], AsyncIterator[Piece]]


class Forward:
    """Forwards everything to the server at `url`. If that server ends before a response has started, the
    request is passed to `elsewhere`, which raises NotBegun if nobody can serve it; the client then gets 503.
    A response that has started is cut off with the server.

    `max_body`: maximum bytes of a request body; beyond: 413. `replica`: sent as X-Replica with each response
    of this server.
    """

    def __init__(self, url: str, max_body: int, elsewhere: Elsewhere, replica: str) -> None:
        self._url = httpx.URL(url)
        self._replica = (b"x-replica", replica.encode())
        self._max_body = max_body
        self._elsewhere = elsewhere
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            trust_env=False,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await _lifespan(receive, send)

    async def answer(self, request: Request) -> AsyncIterator[Piece]:
        """Yield the server's response. Raises NotBegun, or httpx.TransportError once the response has
        started."""
        sent = httpx.Request(
            request.method,
            self._url.copy_with(raw_path=request.target),
            headers=request.headers,
            content=request.body,
        )
        try:
            answer = await self._client.send(sent, stream=True)
        except httpx.TransportError as error:
            raise NotBegun(str(error)) from error
        try:
            yield answer.status_code, [*_for_the_client(answer.headers.raw), self._replica]
            async for piece in answer.aiter_raw():
                yield piece
        finally:
            await answer.aclose()

    # -- HTTP

    async def _http(self, scope: Any, receive: Any, send: Any) -> None:
        body = await self._body(receive)
        if body is None:
            return
        if len(body) > self._max_body:
            await _refuse(send, 413, f"the request's body is above {self._max_body / 2**20:g} MiB")
            return
        headers = [field for field in _end_to_end(scope["headers"]) if field[0] != b"content-length"]
        request = Request(scope["method"], _target(scope), headers, body)
        answering = asyncio.ensure_future(self._send_answer(request, send))
        leaving = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _body(self, receive: Any) -> bytes | None:
        """Return the body, or None if the client is gone. Reads only slightly beyond the limit."""
        body, more = bytearray(), True
        while more and len(body) <= self._max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body)

    async def _send_answer(self, request: Request, send: Any) -> None:
        try:
            await _send_pieces(self.answer(request), send)
        except NotBegun:
            log.warning("the server at %s is gone: sending a request elsewhere", self._url)
            try:
                await _send_pieces(self._elsewhere(request), send)
            except NotBegun:
                await _refuse(send, 503, "no server can take the request; try again later", retry_after=1)

    # -- WebSockets

    async def _websocket(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()  # websocket.connect
        path = _target(scope).decode("latin-1")
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in _end_to_end(scope["headers"])
            if not name.startswith(WEBSOCKET_HANDSHAKE)
        ]
        try:
            server = await connect(
                f"ws://{self._url.host}:{self._url.port}{path}",
                subprotocols=scope.get("subprotocols") or None,
                additional_headers=headers,
                user_agent_header=None,
                compression=None,
                max_size=None,
                ping_interval=None,
                open_timeout=CONNECT_SECONDS,
                proxy=None,
            )
        except (OSError, WebSocketException) as error:
            log.info("WebSocket not accepted: %s", error)
            await send({"type": "websocket.close", "code": CLOSE_BY_ERROR})  # 403 to the client
            return
        async with server:
            await send({"type": "websocket.accept", "subprotocol": server.subprotocol})
            ways = {
                asyncio.ensure_future(_to_server(receive, server)),
                asyncio.ensure_future(_to_client(server, send)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)


async def _to_server(receive: Any, server: ClientConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        while (message := await receive())["type"] == "websocket.receive":
            data = message.get("text")
            await server.send(message["bytes"] if data is None else data)


async def _to_client(server: ClientConnection, send: Any) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in server:
            kind = "text" if isinstance(message, str) else "bytes"
            await send({"type": "websocket.send", kind: message})
    code = server.close_code or CLOSE_BY_ERROR
    # 1005 and 1006 mean that no code was received; they must not be sent.
    code = {1005: 1000, 1006: CLOSE_BY_ERROR}.get(code, code)
    await send({"type": "websocket.close", "code": code, "reason": server.close_reason or ""})


async def _send_pieces(pieces: AsyncIterator[Piece], send: Any) -> None:
    async for piece in pieces:
        if isinstance(piece, bytes):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        else:
            await send({"type": "http.response.start", "status": piece[0], "headers": piece[1]})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(send: Any, status: int, message: str, retry_after: int | None = None) -> None:
    headers = [(b"content-type", b"application/json")]
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"message": message}).encode()})


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


def _target(scope: Any) -> bytes:
    path = scope.get("raw_path") or quote(scope["path"]).encode()
    return path + (b"?" + scope["query_string"] if scope.get("query_string") else b"")


def _for_the_client(headers: Any) -> Fields:
    """Return the headers except those the proxy writes itself; both request ids are kept."""
    names = {b"x-request-id": b"x-replica-request-id"}
    return [
        (names.get(name.lower(), name), value)
        for name, value in _end_to_end(headers)
        if name.lower() not in (b"date", b"server")
    ]


def _end_to_end(headers: Any) -> Fields:
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]
