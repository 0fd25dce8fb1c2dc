"""The middleware of Ray Serve's proxy, around an app that, like Serve's, ends without sending anything if a
replica has died."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import websockets
from support.asgi import serving
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from light_tts.scale.retry import ATTEMPTS, Retry


class Dying:
    """An app that reads a request to its end and ends without a response, `deaths` times; after that it
    responds with what it has read. `begin`: the first attempts end after they have begun a response."""

    def __init__(self, deaths: int, begin: bool = False) -> None:
        self.deaths = deaths
        self.begin = begin
        self.attempts = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.attempts += 1
        read, more = b"", True
        while more:
            message = await receive()
            read += message.get("body", b"")
            more = message.get("more_body", False)
        dies = self.attempts <= self.deaths
        if dies and not self.begin:
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            if not dies:
                await send({"type": "websocket.send", "text": message["type"]})
                await send({"type": "websocket.close", "code": 1000})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": read, "more_body": dies})


async def pieces() -> AsyncIterator[bytes]:
    for number in range(100):
        yield bytes([number]) * 10_000
        await asyncio.sleep(0)


SENT = b"".join(bytes([number]) * 10_000 for number in range(100))


def post(app: Dying) -> httpx.Response:
    async def run() -> httpx.Response:
        async with serving(Retry(app)) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
            return await client.post("/", content=pieces())

    return asyncio.run(run())


async def read_from_websocket(app: Dying) -> tuple[Any, int | None]:
    """The first message and the code at the close. Raises ConnectionClosedError if it is cut off."""
    async with (
        serving(Retry(app)) as url,
        websockets.connect(url.replace("http", "ws"), proxy=None) as socket,
    ):
        message = await socket.recv()
        await socket.wait_closed()
        return message, socket.close_code


@pytest.mark.parametrize("deaths", [0, 1, ATTEMPTS - 1])
def test_a_request_that_has_not_begun_is_repeated_with_its_whole_body(deaths, caplog):
    app = Dying(deaths)
    assert post(app).content == SENT
    assert app.attempts == deaths + 1
    assert caplog.messages == ["/ ended before its response began: trying again"] * deaths


def test_a_request_that_kills_every_replica_is_given_up():
    app = Dying(ATTEMPTS)
    assert post(app).status_code == 500
    assert app.attempts == ATTEMPTS


def test_a_response_that_has_begun_is_cut_off_and_not_repeated(caplog):
    app = Dying(1, begin=True)
    with pytest.raises(httpx.RemoteProtocolError):
        post(app)
    assert app.attempts == 1
    assert caplog.messages == ["/ was cut off after its response had begun"]


def test_a_client_that_has_left_is_not_served_again(caplog):
    attempts = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal attempts
        attempts += 1
        while (await receive())["type"] != "http.disconnect":
            pass

    async def run() -> None:
        async with serving(Retry(app)) as url, httpx.AsyncClient(trust_env=False) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(url, content=b"text", timeout=0.2)
            await asyncio.sleep(0.5)

    asyncio.run(run())
    assert attempts == 1 and not caplog.messages


def test_a_websocket_that_is_not_accepted_yet_is_repeated():
    app = Dying(1)
    assert asyncio.run(read_from_websocket(app)) == ("websocket.connect", 1000)
    with pytest.raises(InvalidStatus, match="500"):
        asyncio.run(read_from_websocket(Dying(ATTEMPTS)))


def test_a_websocket_that_is_accepted_is_cut_off_and_not_repeated(caplog):
    app = Dying(1, begin=True)
    with pytest.raises(ConnectionClosedError, match="no close frame"):
        asyncio.run(read_from_websocket(app))
    assert app.attempts == 1
    assert caplog.messages == ["/ was cut off after its response had begun"]
