"""Generates malformed requests with a fixed seed."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import socket
import struct
from dataclasses import dataclass

import httpx
import websockets

from support.server_process import PROMPT_TEXT, PROMPT_WAV, Server

AT_ONCE = 8
ROUTE = "/inference_zero_shot"
SOCKETS = ("/inference_bistream", "/inference_zero_shot_bistream")
RECORDING = PROMPT_WAV.read_bytes()
ODD_TEXTS = [
    "", " ", "\n\n", "\0", "a\0b", "\u200b", "\ufeff", "\u202e\u202d", "\U0010ffff", "e\u0301" * 200,
    "🙂" * 50, "🏳️‍🌈", "。。。", "!!!", "-" * 500, "x" * 5000, "x" * 5001, "x" * 100_000,
    "<|endofprompt|>", "<|im_end|>", "[laughter]", "<b>", "%s%n{}", "'; DROP TABLE", "9" * 400,
    "١٢٣", "ﷺ", "\x1b[31m", "\r", "\x7f",
]  # fmt: skip
ODD_VALUES = [
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    "",
    "nan",
    "inf",
    "-0",
    [],
    {},
    [[]],
    "x" * 1000,
    "\0",
    "true",
    0.5,
]
FIELDS = [
    "tts_text", "prompt_text", "stream", "speed", "seed", "format", "spk_id", "tts_model_name",
    "min_new_tokens", "max_new_tokens", "top_p", "top_k", "temperature", "win_size", "tau_r", "prompt_wav",
    "nonsense",
]  # fmt: skip


def broken_recording(rng: random.Random) -> bytes:
    match rng.randrange(7):
        case 0:
            return rng.randbytes(rng.randrange(2000))
        case 1:
            return RECORDING[: rng.randrange(200)]
        case 2:  # wrong bytes in the header
            data = bytearray(RECORDING)
            for _ in range(6):
                data[rng.randrange(44)] = rng.randrange(256)
            return bytes(data)
        case 3:  # claims to be huge
            return RECORDING[:40] + struct.pack("<I", 0xFFFFFFF0) + RECORDING[44:2000]
        case 4:  # minutes of silence
            return (
                RECORDING[:4]
                + struct.pack("<I", 5_000_036)
                + RECORDING[8:40]
                + struct.pack("<I", 5_000_000)
                + bytes(5_000_000)
            )
        case 5:
            return rng.choice([b"fLaC", b"OggS", b"ID3\x04", b"FORM", b"caff"]) + rng.randbytes(500)
        case _:  # not-a-number samples
            head = RECORDING[:16] + struct.pack("<IHHIIHH", 16, 3, 1, 24000, 96000, 4, 32)
            return head + b"data" + struct.pack("<I", 80_000) + struct.pack("<f", float("nan")) * 20_000


def good_fields() -> dict:
    return {"tts_text": "Hi.", "prompt_text": PROMPT_TEXT, "min_new_tokens": 1, "max_new_tokens": 5}


def odd_fields(rng: random.Random) -> dict:
    fields = {**good_fields(), "prompt_wav": base64.b64encode(RECORDING).decode()}
    for name in rng.sample(FIELDS, rng.randrange(1, 4)):
        if name.endswith("_new_tokens") and rng.random() < 0.8:
            continue
        fields[name] = rng.choice(ODD_TEXTS if name.endswith("text") and rng.random() < 0.7 else ODD_VALUES)
    if rng.random() < 0.3:
        del fields[rng.choice(list(fields))]
    return fields


def odd_json(rng: random.Random) -> bytes:
    text = json.dumps(odd_fields(rng)).encode()
    match rng.randrange(5):
        case 0:
            return text[: rng.randrange(len(text))]
        case 1:
            return b'{"tts_text": "\\ud800", "prompt_text": ""}'
        case 2:
            return b"[" * rng.randrange(1, 50_000)
        case 3:
            return rng.choice(
                [b"null", b"1", b'"x"', b"[]", b"{}", b"\xff\xfe", b"NaN", b'{"a":1,"a":2}', b""]
            )
        case _:
            return b'{"seed": ' + b"9" * rng.randrange(1, 6000) + b"}"


async def bad_json(rng: random.Random, http: httpx.AsyncClient, _server: Server) -> int:
    headers = {"content-type": "application/json"}
    body = odd_json(rng) if rng.random() < 0.5 else json.dumps(odd_fields(rng)).encode()
    return (await http.post(ROUTE, content=body, headers=headers)).status_code


async def bad_form(rng: random.Random, http: httpx.AsyncClient, _server: Server) -> int:
    fields = odd_fields(rng)
    recording = fields.pop("prompt_wav", None)
    files = None if recording is None else {"prompt_wav": ("a", broken_recording(rng))}
    data = {name: str(value) for name, value in fields.items() if value is not None}
    return (await http.post(ROUTE, data=data, files=files)).status_code


async def bad_recording(rng: random.Random, http: httpx.AsyncClient, _server: Server) -> int:
    route = rng.choice([ROUTE, "/add_spk"])
    data = {**good_fields(), "spk_id": "x"} if route == "/add_spk" else good_fields()
    files = {"prompt_wav": ("prompt.wav", broken_recording(rng))}
    return (await http.post(route, data=data, files=files)).status_code


async def bad_body(rng: random.Random, http: httpx.AsyncClient, _server: Server) -> int:
    kinds = [
        "multipart/form-data", "multipart/form-data; boundary=x", 'multipart/form-data; boundary="',
        "text/plain", "multipart/form-data; boundary=x; charset=none", "application/x-www-form-urlencoded",
        "", "a/b/c", "application/json; charset=utf-16",
    ]  # fmt: skip
    bodies = [
        rng.randbytes(300),
        b'--x\r\nContent-Disposition: form-data; name="tts_text"\r\n\r\n' + rng.randbytes(50),
        b'--x\r\nContent-Disposition: form-data; name="tts_text"\r\n\r\nhi\r\n--x--\r\n',
        b"--x\r\nContent-Disposition: form-data\r\n\r\nhi\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="prompt_wav"; filename="' + b"n" * 3000,
        b"tts_text=%ff%00&" * 100,
    ]
    headers = {"content-type": rng.choice(kinds)}
    return (await http.post(ROUTE, content=rng.choice(bodies), headers=headers)).status_code


async def bad_route(rng: random.Random, http: httpx.AsyncClient, _server: Server) -> int:
    names = ["..%2F..%2Fetc%2Fpasswd", "%00", "%ff", ".", "a" * 300, "%2e%2e", "x%2Fy", "没有", "a%0Ab"]
    method, path = rng.choice(
        [
            ("DELETE", f"/spk/{rng.choice(names)}"),
            ("GET", ROUTE),
            ("PUT", "/add_spk"),
            ("POST", "/metrics"),
            ("GET", f"/{rng.choice(names)}"),
            ("GET", SOCKETS[0]),
            ("OPTIONS", "/health"),
        ]
    )
    return (await http.request(method, path)).status_code


async def too_large(rng: random.Random, http: httpx.AsyncClient, _server: Server) -> int:
    async def endless():
        for _ in range(25):
            yield bytes(2**20)

    kind = rng.choice(["application/json", "multipart/form-data; boundary=x"])
    body = endless() if rng.random() < 0.5 else bytes(21 * 2**20)
    try:
        return (await http.post(ROUTE, content=body, headers={"content-type": kind})).status_code
    except httpx.WriteError:  # answered and closed before all was sent
        return 413


async def early_leave(rng: random.Random, _http: httpx.AsyncClient, server: Server) -> int:
    """A client that disconnects while it sends, or before the response is complete, or never speaks HTTP."""
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = json.dumps({**good_fields(), "stream": True, "spk_id": "tiny_spk", "max_new_tokens": 400}).encode()
    head = (
        f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    request = head.encode() + body
    writer.write(rng.randbytes(200) if rng.random() < 0.2 else request[: rng.randrange(1, len(request) + 1)])
    await writer.drain()
    await asyncio.sleep(rng.random() * 0.05)
    if rng.random() < 0.5:  # a reset instead of an orderly end
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    return 400


async def bad_socket(rng: random.Random, _http: httpx.AsyncClient, server: Server) -> int:
    """Random messages; the server answers with an error, a close, or both, or the client disconnects."""
    good = [{"spk_id": "tiny_spk"}, {"prompt_text": PROMPT_TEXT}, {"tts_text": "Hi."}, {"finish": True}]
    odd = [
        "{",
        "[]",
        "null",
        "\0",
        rng.randbytes(100),
        RECORDING[:100],
        {"tts_text": rng.choice(ODD_TEXTS[:15])},
    ]
    odd += [{"finish": "no"}, {rng.choice(FIELDS): rng.choice(ODD_VALUES)}, {"spk_id": "../x"}]
    messages = [rng.choice(good if rng.random() < 0.5 else odd) for _ in range(rng.randrange(1, 6))]
    try:
        async with websockets.connect(
            server.websocket_url + rng.choice(SOCKETS), open_timeout=30, close_timeout=5
        ) as connection:
            for message in messages:
                await connection.send(message if isinstance(message, bytes | str) else json.dumps(message))
            if rng.random() < 0.3:
                return 400
            await connection.send("{")
            while True:
                await asyncio.wait_for(connection.recv(), 30)
    except websockets.ConnectionClosed as closed:
        assert closed.rcvd is not None and closed.rcvd.code in (1000, 1003, 1007, 1008, 1009), (
            messages,
            closed,
        )
        return 400


async def bad_frame(rng: random.Random, _http: httpx.AsyncClient, server: Server) -> int:
    """A WebSocket handshake followed by bytes that are not frames."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    key = base64.b64encode(rng.randbytes(16)).decode()
    writer.write(
        f"GET {SOCKETS[0]} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert b"101" in await asyncio.wait_for(reader.readline(), 30)
    writer.write(
        rng.choice([rng.randbytes(100), b"\x81\x05hello", b"\xff" * 50, b"\x81\xfe\xff\xff" + b"\0" * 9])
    )
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.close()
    return 400


# Relative frequency of each kind.
KINDS = {
    bad_json: 130,
    bad_form: 110,
    bad_recording: 60,
    bad_body: 50,
    bad_route: 40,
    early_leave: 45,
    bad_socket: 45,
    bad_frame: 15,
    too_large: 5,
}


@dataclass(frozen=True)
class Answer:
    """`status`: 400 if the client disconnected before the end, or a WebSocket was closed with a client error
    code. `number` and the seed reproduce the request."""

    number: int
    kind: str
    status: int


def harmed(answer: Answer) -> bool:
    """Return whether the response was not a client error."""
    return not (answer.status == 200 or 400 <= answer.status < 500)


async def send_all(server: Server, count: int, seed: int) -> list[Answer]:
    """`count` requests of all kinds, AT_ONCE at a time."""
    kinds = random.Random(seed).choices(list(KINDS), weights=list(KINDS.values()), k=count)
    places = asyncio.Semaphore(AT_ONCE)

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

        async def one(number: int, kind) -> Answer:
            async with places:
                status = await kind(random.Random(seed * 500 + number), http, server)
                return Answer(number, kind.__name__, status)

        return await asyncio.gather(*(one(number, kind) for number, kind in enumerate(kinds)))
