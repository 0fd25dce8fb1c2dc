"""ASGI middleware that accepts only requests with a valid API key, within that key's limits."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from light_tts.server.connections.gate import STATUS_PATHS
from light_tts.server.core import metrics
from light_tts.server.core.settings import Settings
from light_tts.server.httpserver.access.keys import SUBPROTOCOL, ApiKeys, offered_protocols, presented_key
from light_tts.server.httpserver.access.usage import KeyUsage
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.openai.errors import error_body

# These show only the server's own pages and its status.
OPEN_PATHS = STATUS_PATHS | {"/", "/docs", "/redoc", "/openapi.json"}
OPEN_FOLDERS = ("/page/", "/static-offline-docs/")


class Guard:
    """Checks the API key of each request; without configured keys every request passes. `app.state.key_usage`
    exists once the worker has started."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: ApiKeys) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not len(self._keys) or scope["type"] == "lifespan" or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        usage: KeyUsage = scope["app"].state.key_usage
        try:
            key = self._admitted_key(presented_key(headers), usage)
        except RequestError as error:
            metrics.refused_total.labels(error.refusal).inc()
            await _refuse(scope, send, error)
            return
        usage.begin(key)
        try:
            await self._app(scope, receive, _choosing_protocol(scope, headers, send))
        finally:
            usage.end(key)

    def _admitted_key(self, presented: str, usage: KeyUsage) -> int:
        """The index of the key. Raises RequestError (401, 429)."""
        settings = self._settings
        key = self._keys.index(presented)
        if key is None:
            raise RequestError(
                401,
                "an API key is required: Authorization: Bearer KEY, or xi-api-key: KEY",
                refusal="no_key",
            )
        streams, rate = settings.key_streams, settings.key_requests_per_minute
        if streams is not None and usage.open_requests(key) >= streams:
            raise RequestError(429, f"{streams} requests with this key are already active", 1, "key_streams")
        if rate is not None and usage.rate(key, time.time()) >= rate:
            seconds = max(1, round(60 / rate))
            raise RequestError(
                429, f"there were {rate} requests with this key within a minute", seconds, "key_requests"
            )
        return key


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def _choosing_protocol(scope: Scope, headers: Mapping[str, str], send: Send) -> Send:
    """Return a `send` that accepts a WebSocket with one of the subprotocols offered besides the key, as
    browsers require."""
    protocols = offered_protocols(headers) if scope["type"] == "websocket" else []
    chosen = next((name for name in protocols if not name.startswith(SUBPROTOCOL)), None)
    if chosen is None:
        return send

    async def choose(message: Message) -> None:
        if message["type"] == "websocket.accept" and not message.get("subprotocol"):
            message = {**message, "subprotocol": chosen}
        await send(message)

    return choose


async def _refuse(scope: Scope, send: Send, error: RequestError) -> None:
    body = json.dumps({"message": error.message, "detail": error.message, **error_body(error)}).encode()
    fields: dict[str, Any] = {"content-type": "application/json", "content-length": len(body)}
    if error.status == 401:
        fields["www-authenticate"] = "Bearer"
    if error.retry_after is not None:
        fields["retry-after"] = error.retry_after
    raw = [(name.encode(), str(value).encode()) for name, value in fields.items()]
    kind = "http" if scope["type"] == "http" else "websocket.http"
    await send({"type": f"{kind}.response.start", "status": error.status, "headers": raw})
    await send({"type": f"{kind}.response.body", "body": body})
