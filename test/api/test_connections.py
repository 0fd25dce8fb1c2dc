"""Input limits enforced while bytes arrive, tested against a real server: excess input is refused before it
is stored, silent clients are disconnected, and nobody blocks others."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import resource
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
import websockets
from support.server_process import PROMPT_TEXT, PROMPT_WAV, Server, launch, speak
from support.waiting import eventually

FILES = 400  # that a process may open; the soft limit is lower
CONNECTIONS = 300  # three quarters of it
MB = 2**20
ROUTE = "/inference_zero_shot"
BLOCK = b"x" * 65536


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, FILES))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = {"header_timeout": 2, "body_timeout": 2, "max_upload_mb": 2, "max_inflight_upload_mb": 5}
    with launch(preexec=few_files, **flags) as running:
        with running.client() as client:
            assert speak(client, "Hello.").status_code == 200
        yield running


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def push(connection: socket.socket, block: bytes, times: int) -> bytes:
    """Send until a response arrives or everything is sent; then return what is received until the end."""
    connection.setblocking(False)
    for _ in range(times):
        rest = block
        while rest:
            try:
                rest = rest[connection.send(rest) :]
            except BlockingIOError:
                time.sleep(0.001)
            except ConnectionError:
                break
        try:
            if connection.recv(1, socket.MSG_PEEK):
                break
        except BlockingIOError:
            pass
    connection.settimeout(30)
    return read_all(connection)


def peak_memory(server: Server, action: Callable[[], None]) -> float:
    """Return by how many MiB the memory of the HTTP worker rose above idle."""
    (worker,) = server.workers

    def read(name: str) -> int:
        lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")
    rest = read("VmRSS")
    action()
    return (read("VmHWM") - rest) / 1024


def post(size: int | None, *more: str) -> bytes:
    length = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
    lines = [f"POST {ROUTE} HTTP/1.1", "Host: x", "Content-Type: application/json", length, *more, "", ""]
    return "\r\n".join(lines).encode()


def speech(**fields: object) -> bytes:
    """Return a complete request."""
    content = {
        "tts_text": "Hello there.",
        "prompt_text": PROMPT_TEXT,
        "min_new_tokens": 20,
        "max_new_tokens": 20,
    }
    content["prompt_wav"] = base64.b64encode(PROMPT_WAV.read_bytes()).decode()
    body = json.dumps({**content, **fields}).encode()
    return post(len(body)) + body


def message_of(answer: bytes) -> str:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["message"]


# ---------------------------------------------------------------- too much


@pytest.mark.parametrize(
    ("status", "head", "block"),
    [
        (431, b"GET /liveness HTTP/1.1\r\nHost: x\r\n", b"x-some: " + b"y" * 1000 + b"\r\n"),
        (431, b"GET /liveness HTTP/1.1\r\nHost: x\r\n", b"a:\r\n" * 1000),
        (431, b"GET /liveness HTTP/1.1\r\nHost: x\r\nx-long: ", BLOCK),
        (431, b"GET /liveness HTTP/1.1\r\nHost: x\r\n", BLOCK),
        (431, post(None) + b"1\r\nx\r\n0\r\nx-trailer: ", BLOCK),
        (414, b"GET /", BLOCK),
        (414, b"GET /liveness?", BLOCK),
        (413, post(None), b"10000\r\n" + BLOCK + b"\r\n"),
        (413, post(10**9), BLOCK),
        (400, b"", BLOCK),
    ],
    ids=[
        "fields",
        "tiny fields",
        "field",
        "name",
        "trailer",
        "path",
        "query",
        "chunks",
        "announced",
        "noise",
    ],
)
def test_what_is_too_large_is_refused_while_it_comes(server, status, head, block):
    answers = []

    def attack() -> None:
        with connect(server) as connection:
            connection.sendall(head)
            answers.append(push(connection, block, 50 * MB // len(block)))

    rise = peak_memory(server, attack)
    assert answers[0].startswith(b"HTTP/1.1 %d " % status), answers[0][:200]
    assert b"connection: close" in answers[0].lower()
    assert message_of(answers[0])
    assert rise < 16
    assert httpx.get(f"{server.url}/liveness").status_code == 200


def test_bodies_that_wait_are_bounded_together(server):
    """Twelve incomplete bodies: at most 5 MiB of them are accepted, and other clients are served once some
    have been refused."""
    answers = []

    def attack() -> None:
        with ExitStack() as stack:
            connections = [stack.enter_context(connect(server)) for _ in range(12)]
            for connection in connections:
                connection.sendall(post(2 * MB - 100))
            for _ in range(30):
                for connection in connections:
                    with suppress(ConnectionError):
                        connection.sendall(BLOCK)
            # two of these bodies have room, and each of the others has an answer
            assert eventually(lambda: len(select.select(connections, [], [], 0)[0]) >= 10, 20)
            with server.client() as client:
                assert speak(client, "Hello.").status_code == 200
            answers.extend(read_all(connection) for connection in connections)

    assert peak_memory(server, attack) < 40
    status = [answer.split()[1] for answer in answers if answer]
    assert set(status) <= {b"429", b"408"} and b"429" in status
    busy = next(answer for answer in answers if b" 429 " in answer)
    assert b"retry-after: 1" in busy and "--max_inflight_upload_mb" in message_of(busy)
    assert server.metric("light_tts_refused_connections_total", status="429") >= status.count(b"429")


def test_a_websocket_message_above_the_limit_is_refused_when_it_is_announced(server):
    async def converse() -> None:
        async with websockets.connect(f"{server.websocket_url}/inference_bistream") as connection:
            connection.transport.write(b"\x82\xff" + (60 * MB).to_bytes(8, "big") + bytes(4))
            error = json.loads(await asyncio.wait_for(connection.recv(), 10))
            assert error == {"error": "a message is above 2 MiB", "status": 413}
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await asyncio.wait_for(connection.recv(), 10)
            assert closed.value.rcvd.code == 1009

    assert peak_memory(server, lambda: asyncio.run(converse())) < 16


@pytest.mark.parametrize("pieces", [1, 16])
def test_websocket_messages_that_wait_are_bounded_together(server, pieces):
    """Six messages of 1.9 MiB, in one or several frames, without their last byte."""
    size = 1_900_000 // pieces

    async def send(codes: list[int]) -> None:
        async with websockets.connect(f"{server.websocket_url}/inference_bistream") as connection:
            for piece in range(pieces):
                last = piece == pieces - 1
                first_byte = (0x80 if last else 0) | (2 if piece == 0 else 0)
                head = bytes([first_byte, 0xFF]) + size.to_bytes(8, "big") + bytes(4)
                with suppress(RuntimeError):  # refused already
                    connection.transport.write(head + bytes(size - last))
                await asyncio.sleep(0.01)
            try:
                while True:
                    await asyncio.wait_for(connection.recv(), 3)
            except websockets.ConnectionClosed as closed:
                codes.append(closed.rcvd.code)
            except asyncio.TimeoutError:
                connection.transport.abort()

    async def send_all() -> list[int]:
        codes: list[int] = []
        await asyncio.gather(*(send(codes) for _ in range(6)))
        return codes

    codes: list[int] = []
    assert peak_memory(server, lambda: codes.extend(asyncio.run(send_all()))) < 40
    assert codes and set(codes) == {1013} and len(codes) < 6


def test_requests_sent_without_waiting_for_answers_are_bounded(server):
    def attack() -> None:
        with connect(server) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 5000)
            with suppress(ConnectionError):
                read_all(connection)

    assert peak_memory(server, attack) < 16


# ---------------------------------------------------------------- silence


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /live",
        b"GET /liveness HTTP/1.1\r\nHost: x\r\n",
        post(1000),
        post(1000) + b"{",
        post(None) + b"3\r\n{",
    ],
    ids=["URL", "header", "no body", "body", "chunks"],
)
def test_a_request_that_does_not_go_on_gets_408_and_its_connection_is_closed(server, begun):
    with connect(server) as connection:
        connection.sendall(begun)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer
    assert "2 s" in message_of(answer)


def test_a_connection_that_says_nothing_is_closed(server):
    with connect(server) as silent, connect(server) as blank:
        blank.sendall(b"\r\n")
        assert read_all(silent) == read_all(blank) == b""
    with connect(server) as kept:
        kept.sendall(b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(kept).startswith(b"HTTP/1.1 200 ")


def test_a_slow_body_that_goes_on_is_taken(server):
    request = speech()
    with connect(server) as connection:
        for start in range(0, len(request), len(request) // 4):
            connection.sendall(request[start : start + len(request) // 4])
            time.sleep(0.8)
        connection.shutdown(socket.SHUT_WR)
        assert b"HTTP/1.1 200 " in read_all(connection)


def test_an_answer_before_the_end_of_the_body_ends_the_connection(server):
    with connect(server) as connection:
        connection.sendall(post(1000).replace(ROUTE.encode(), b"/nowhere"))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 404 ") and b"connection: close" in answer


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_stops_sending_after_its_request_gets_its_answer(server, stream):
    with connect(server) as connection:
        connection.sendall(speech(stream=stream))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    head, _, body = answer.rpartition(b"HTTP/1.1 200 OK\r\n")[2].partition(b"\r\n\r\n")
    assert b"connection: close" in head
    if stream:
        assert body.endswith(b"0\r\n\r\n")
    else:
        assert len(body) == 20 * 960 * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_gone_is_noticed(server, stream):
    before = server.metric("light_tts_requests_total", outcome="disconnected")
    with connect(server) as connection:
        connection.sendall(speech(stream=stream, min_new_tokens=2000, max_new_tokens=2000))
        if not stream:
            time.sleep(0.3)
    assert eventually(lambda: server.metric("light_tts_requests_total", outcome="disconnected") > before, 60)


def test_a_reset_in_the_middle_of_a_request_does_no_harm(server):
    for begun in (b"GET /live", post(1000) + b"{", speech()):
        with connect(server) as connection:
            connection.sendall(begun)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert httpx.get(f"{server.url}/liveness").status_code == 200


# ---------------------------------------------------------------- many connections


def test_idle_connections_keep_nobody_out(server):
    """More of them than files that the server may open."""
    raised = re.search(r"open files: at most (\d+) \(raised from (\d+)\)", server.output)
    assert raised and raised.groups() == (str(FILES), "128")
    with ExitStack() as stack:
        for number in range(FILES + 100):
            stack.enter_context(connect(server))
            if number % 50 == 49:
                assert httpx.get(f"{server.url}/liveness", timeout=30).status_code == 200
        assert server.metric("light_tts_http_connections") <= CONNECTIONS + 1
        with server.client() as client:
            assert speak(client, "Hello.").status_code == 200
    assert f"--max_connections: all {CONNECTIONS} are open" in server.output
    assert "Too many open files" not in server.output


def test_busy_connections_leave_room_for_those_who_ask_how_the_server_is(server):
    with ExitStack() as stack:
        for _ in range(CONNECTIONS + 2):
            connection = stack.enter_context(connect(server))
            connection.sendall(post(1000))
        assert eventually(lambda: httpx.get(f"{server.url}/spk_list").status_code == 503, 30)
        for path, status in (("/liveness", 200), ("/metrics", 200), ("/spk_list", 503)):
            answer = httpx.get(f"{server.url}{path}", timeout=30)
            assert answer.status_code == status, answer.text
        assert "too many connections" in answer.json()["message"]
    assert eventually(lambda: httpx.get(f"{server.url}/spk_list").status_code == 200, 30)
