"""The proxy of a replica: responses are streamed through, and the server may be gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import websockets
from support.asgi import serving

from light_tts.scale.forward import Forward, NotBegun, Piece, Request

NOWHERE = "http://127.0.0.1:9"


async def server_app(scope, receive, send) -> None:
    """Over a WebSocket says once what it hears, in capitals; over HTTP sends two pieces, of /broken one."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        message = await receive()
        await send({"type": "websocket.send", "text": message["text"].upper()})
        await send({"type": "websocket.close", "code": 1000, "reason": "done"})
        return
    status = 429 if scope["path"] == "/busy" else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"7")]})
    await send({"type": "http.response.body", "body": b"first", "more_body": True})
    if scope["path"] == "/broken":
        raise RuntimeError("the server breaks off")
    await send({"type": "http.response.body", "body": b"second"})


async def nobody(request: Request) -> AsyncIterator[Piece]:
    raise NotBegun
    yield b""


async def another(request: Request) -> AsyncIterator[Piece]:
    yield 200, []
    yield b"elsewhere: " + request.target + b" " + request.body


def get(path: str, forward=None, elsewhere=nobody, body: bytes = b"") -> httpx.Response:
    """The answer to a request through a Forward to the server above, or to `forward`."""

    async def run() -> httpx.Response:
        async with (
            serving(server_app) as url,
            serving(Forward(forward or url, 100, elsewhere, "first")) as through,
            httpx.AsyncClient(base_url=through, trust_env=False) as client,
        ):
            return await client.post(path, content=body)

    return asyncio.run(run())


def test_status_header_and_body_pass():
    answer = get("/busy?x=1")
    assert (answer.status_code, answer.headers["retry-after"], answer.text) == (429, "7", "firstsecond")
    assert answer.headers["x-replica"] == "first"


def test_a_request_whose_server_is_gone_is_made_elsewhere():
    assert get("/a%20b?x=1", NOWHERE, another, b"text").text == "elsewhere: /a%20b?x=1 text"


def test_where_nobody_serves_the_client_is_told_to_try_again():
    answer = get("/", NOWHERE)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_an_answer_that_breaks_off_is_not_complete_and_not_made_again():
    with pytest.raises(httpx.RemoteProtocolError):
        get("/broken", None, another)


def test_a_body_above_the_limit_is_refused():
    assert get("/", body=b"x" * 101).status_code == 413


def test_a_websocket_passes_both_ways_with_its_close():
    async def run() -> tuple[object, int | None, str | None]:
        async with (
            serving(server_app) as url,
            serving(Forward(url, 100, nobody, "first")) as through,
            websockets.connect(through.replace("http", "ws") + "/talk") as socket,
        ):
            await socket.send("hello")
            answer = await socket.recv()
            await socket.wait_closed()
            return answer, socket.close_code, socket.close_reason

    assert asyncio.run(run()) == ("HELLO", 1000, "done")
