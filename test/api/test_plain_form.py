"""The fast parser of forms agrees with the general one, or leaves the form to it."""

from __future__ import annotations

import asyncio

import aiohttp
import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from light_tts.server.httpserver.fields import MAX_FORM_FIELDS, MAX_FORM_FILES
from light_tts.server.httpserver.plain_form import plain_form

FIELDS = {"tts_text": "How are you?\r\n--b\r\nFine – 好.", "seed": "7", "empty": ""}
WAV = bytes(range(256)) * 100 + b"\r\n--"
KIND = "multipart/form-data; boundary=b"


def parsed(kind: str, body: bytes) -> dict[str, str | bytes] | None:
    return plain_form(kind, body, MAX_FORM_FILES, MAX_FORM_FIELDS)


def parsed_generally(kind: str, body: bytes) -> dict[str, str | bytes]:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def read() -> dict[str, str | bytes]:
        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode())]}
        async with Request(scope, receive).form() as form:
            return {
                name: value if isinstance(value, str) else await value.read() for name, value in form.items()
            }

    return asyncio.run(read())


def form(*parts: str, end: str = "--b--\r\n") -> bytes:
    return "".join(f"--b\r\n{part}\r\n" for part in parts).encode() + end.encode()


def test_form_of_httpx() -> None:
    request = httpx.Request("POST", "http://x", data=FIELDS, files={"prompt_wav": ("a.wav", WAV)})
    values = parsed(request.headers["content-type"], request.read())
    assert values == {**FIELDS, "prompt_wav": WAV}


def test_form_of_aiohttp() -> None:
    async def written() -> tuple[str, bytes]:
        data = aiohttp.FormData()
        for name, value in FIELDS.items():
            data.add_field(name, value)
        data.add_field("prompt_wav", WAV, filename="prompt.wav", content_type="audio/wav")
        payload = data()
        return payload.headers["content-type"], await payload.as_bytes()

    assert parsed(*asyncio.run(written())) == {**FIELDS, "prompt_wav": WAV}


PLAIN = 'Content-Disposition: form-data; name="seed"'
FILE = 'Content-Disposition: form-data; name="prompt_wav"; filename="a b.wav"\r\nContent-Type: audio/wav'


@pytest.mark.parametrize(
    "body",
    [
        form(f"{PLAIN}\r\n\r\n1"),
        form(f"{PLAIN}\r\n\r\n1", f"{PLAIN}\r\n\r\n2"),
        form(f"{FILE}\r\n\r\nx", f"{PLAIN}\r\n\r\n", end="--b--"),
        form(f"{FILE}\r\n\r\n\r\n\r\n", f"{PLAIN}\r\n\r\n\r\n\r\n2"),
        form(f"{PLAIN.lower()}\r\n\r\n\r\n--"),
    ],
)
def test_usual_forms_are_parsed_alike(body: bytes) -> None:
    assert parsed(KIND, body) == parsed_generally(KIND, body)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (KIND, b""),
        (KIND, b"--b--\r\n"),
        (KIND, b"--b\r\n--b--"),
        (KIND, form(PLAIN)),
        (KIND, form(f"{PLAIN}\r\n\r\n1", end="")),
        (KIND, form(f"{PLAIN}\r\n\r\n1", end="--b--\r\nmore")),
        (KIND, form(f"{PLAIN}\r\n\r\n1\r\n--bc")),
        (KIND, form(f"{PLAIN}\r\n\r\n1\r\n--b \r\n{PLAIN}\r\n\r\n2")),
        (KIND, form("Content-Type: text/plain\r\n\r\n1")),
        (KIND, form('Content-Disposition: form-data; name="s\\"d"\r\n\r\n1')),
        (KIND, form('Content-Disposition: form-data; name="seed"; filename="ü.wav"\r\n\r\n1')),
        (KIND, form(f"{PLAIN}\r\nX-Other: 1\r\n\r\n1")),
        (KIND, form(f"{PLAIN}\r\n\r\n").replace(b"\r\n\r\n", b"\r\n\r\n\xff")),
        (KIND, form(*[f"{FILE}\r\n\r\nx"] * (MAX_FORM_FILES + 1))),
        (KIND, form(*[f"{PLAIN}\r\n\r\nx"] * (MAX_FORM_FIELDS + 1))),
        (f"{KIND}; charset=latin-1", form(f"{PLAIN}\r\n\r\n1")),
        ("multipart/form-data", form(f"{PLAIN}\r\n\r\n1")),
        ("application/x-www-form-urlencoded", b"seed=1"),
    ],
)
def test_unusual_forms_are_left_to_the_general_parser(kind: str, body: bytes) -> None:
    assert parsed(kind, body) is None
