"""Attacks a server on this machine, started for the purpose, and measures the effect.

    python test/attacks.py              all of them
    python test/attacks.py url frames   some

Reports for each attack the peak memory increase of the HTTP worker, the longest response time of /liveness in
the meantime, and the responses the attackers got. For `texts`: the P95 of a short request alone, and
alongside ten clients that send expensive texts. At most a minute each, this machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import os
import resource
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
from support.server_process import Server, launch, speak

SECONDS = 30.0  # of one attack
BLOCK = b"x" * 65536
MB = 10**6
Told = collections.Counter[str]


# ---------------------------------------------------------------- what an attacker does


async def send(server: Server, head: bytes, size: int, told: Told, block: bytes = BLOCK) -> None:
    """Send `head`, then `size` bytes, then wait until the server closes. Counts the responses."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    answer = asyncio.create_task(reader.read(100_000))
    try:
        writer.write(head)
        for _ in range(size // len(block)):
            if writer.is_closing() or answer.done():
                break
            writer.write(block)
            await writer.drain()
        first = (await answer).partition(b"\r\n")[0].decode("latin-1")
        told[first or "closed"] += 1
    except OSError as error:
        told[answer.result().partition(b"\r\n")[0].decode("latin-1") if done(answer) else repr(error)] += 1
    finally:
        answer.cancel()
        writer.close()


def done(answer: asyncio.Task[bytes]) -> bool:
    return answer.done() and not answer.cancelled() and answer.exception() is None and bool(answer.result())


async def send_frame(server: Server, size: int, told: Told) -> None:
    """Announce a WebSocket message of `size` bytes and send all but the last one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET /inference_bistream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    answer = asyncio.create_task(reader.read(100_000))
    try:
        writer.write(b"\x82\xff" + size.to_bytes(8, "big") + bytes(4))
        for _ in range((size - 1) // len(BLOCK)):
            if writer.is_closing() or answer.done():
                break
            writer.write(BLOCK)
            await writer.drain()
        frames = await answer + await reader.read(1000)
        code = frames.rpartition(b"\x88")[2][1:3] if b"\x88" in frames else b""
        told[f"close {int.from_bytes(code, 'big')}" if code else "closed"] += 1
    except OSError as error:
        told[repr(error)] += 1
    finally:
        answer.cancel()
        writer.close()


# ---------------------------------------------------------------- attacks


async def headers(server: Server, told: Told) -> None:
    """600 MB of header fields on one connection."""
    fields = b"".join(b"x-%d: %s\r\n" % (n, b"y" * 100) for n in range(600))
    await send(server, b"GET /liveness HTTP/1.1\r\nHost: x\r\n", 600 * MB, told, fields)


async def field(server: Server, told: Told) -> None:
    """600 MB of one header field on one connection."""
    await send(server, b"GET /liveness HTTP/1.1\r\nHost: x\r\nx-long: ", 600 * MB, told)


async def url(server: Server, told: Told) -> None:
    """A URL of 600 MB."""
    await send(server, b"GET /", 600 * MB, told)


def _post(kind: str, size: int) -> bytes:
    head = f"POST /inference_zero_shot HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {size}\r\n\r\n".encode()


async def bodies(server: Server, told: Told) -> None:
    """40 JSON bodies of 19 MB that lack their last bytes."""
    head = _post("application/json", 19 * MB) + b'{"tts_text": "'
    await asyncio.gather(*(send(server, head, 19 * MB - len(BLOCK), told) for _ in range(40)))


async def frames(server: Server, told: Told) -> None:
    """20 WebSocket messages of 60 MB that lack their last byte."""
    await asyncio.gather(*(send_frame(server, 60 * MB, told) for _ in range(20)))


async def small_frames(server: Server, told: Told) -> None:
    """20 WebSocket messages of 19 MB, which is allowed, that lack their last byte."""
    await asyncio.gather(*(send_frame(server, 19 * MB, told) for _ in range(20)))


async def pipeline(server: Server, told: Told) -> None:
    """20 connections that request /health 100,000 times without waiting for a response."""
    block = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 2000
    await asyncio.gather(*(send(server, b"", 50 * len(block), told, block) for _ in range(20)))


async def idle(server: Server, told: Told) -> None:
    """2,000 silent connections, held for 10 s (the server was started with `ulimit -Sn 1024`)."""
    connections = []
    for number in range(2000):
        with contextlib.suppress(OSError):
            connections.append(await asyncio.open_connection("127.0.0.1", server.port))
        if number % 100 == 99:
            await asyncio.sleep(0.01)
    await asyncio.sleep(10)
    for reader, writer in connections:
        told["closed" if reader.at_eof() else "open"] += 1
        writer.close()


ATTACKS: dict[str, Callable[[Server, Told], Awaitable[None]]] = {
    attack.__name__: attack for attack in (headers, field, url, bodies, frames, small_frames, pipeline, idle)
}


# ---------------------------------------------------------------- texts that cost

COSTLY = [mark * 5000 for mark in '.。(-"'] + ["1," * 2500, "1 " * 2500, "a." * 2500, "? a " * 1250]
COSTLY += ["The day was long and bright, and nobody said a word. " * 90]  # an ordinary long text
SHORT_REQUESTS = 40


async def say(client: httpx.AsyncClient, text: str) -> int:
    fields = {"tts_text": text, "spk_id": "tiny_spk", "min_new_tokens": 1, "max_new_tokens": 25}
    return (await client.post("/inference_zero_shot", data=fields)).status_code


async def short_requests(client: httpx.AsyncClient, count: int) -> list[float]:
    """Seconds of each, one after the other."""
    times = []
    for number in range(count):
        begun = time.monotonic()
        assert await say(client, f"I have {number} cats.") == 200
        times.append(time.monotonic() - begun)
    return sorted(times)


async def texts(server: Server) -> None:
    """Print the figures of a short request alone and alongside each expensive text, sent by ten clients."""
    print("\n| text, sent by 10 clients | answers | P50 alone | P95 alone | P50 | P95 | P95s' ratio |")
    print("| --- " * 7 + "|")
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        await short_requests(client, 5)
        for text in COSTLY:
            alone = await short_requests(client, SHORT_REQUESTS)
            told: collections.Counter[int] = collections.Counter()

            async def attack(text: str = text, told: collections.Counter[int] = told) -> None:
                while True:
                    told[await say(client, text)] += 1
                    await asyncio.sleep(0.05)

            attackers = [asyncio.create_task(attack()) for _ in range(10)]
            await asyncio.sleep(0.5)
            try:
                beside = await asyncio.wait_for(short_requests(client, SHORT_REQUESTS), 60)
            except asyncio.TimeoutError:
                beside = [float("inf")]
            for attacker in attackers:
                attacker.cancel()
            await asyncio.gather(*attackers, return_exceptions=True)
            await asyncio.sleep(1)
            answers = ", ".join(f"{count} x {status}" for status, count in told.most_common()) or "none yet"
            figures = [times[int(len(times) * share)] for times in (alone, beside) for share in (0.5, 0.95)]
            cells = " | ".join(f"{seconds:.2f} s" for seconds in figures)
            print(f"| `{text[:6]}`... | {answers} | {cells} | {figures[3] / figures[1]:.1f} |", flush=True)


# ---------------------------------------------------------------- measuring


def memory(pid: int, name: str) -> float:
    """Return MB: `VmRSS` now, or `VmHWM`, the maximum since `forget_peak`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) * 1024 / MB


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


async def ask_liveness(server: Server, times: list[float]) -> None:
    """Request it repeatedly, each time on a new connection."""
    while True:
        begun = time.monotonic()
        try:
            async with httpx.AsyncClient(timeout=10) as client:
                ok = (await client.get(f"{server.url}/liveness")).status_code == 200
        except httpx.HTTPError:
            ok = False
        times.append(time.monotonic() - begun if ok else float("inf"))
        await asyncio.sleep(0.1)


async def attack(server: Server, name: str) -> None:
    pid = server.workers[0].pid
    with server.client() as client:
        speak(client, "Hello there.")  # fills all caches
    rest = memory(pid, "VmRSS")
    forget_peak(pid)
    told: Told = collections.Counter()
    times: list[float] = []
    asking = asyncio.create_task(ask_liveness(server, times))
    begun = time.monotonic()
    try:
        await asyncio.wait_for(ATTACKS[name](server, told), SECONDS)
    except asyncio.TimeoutError:
        told["still open at the end"] += 1
    seconds = time.monotonic() - begun
    await asyncio.sleep(0.2)
    asking.cancel()
    rise = memory(pid, "VmHWM") - rest
    answers = ", ".join(f"{count} x {what}" for what, count in told.most_common(4))
    print(f"| {name} | {rise:.0f} MB | {max(times):.2f} s | {seconds:.1f} s | {answers} |", flush=True)


def soft_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", metavar="attack")
    names = parser.parse_args().attacks or [*ATTACKS, "texts"]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if names != ["texts"]:
        print("| attack | memory above rest, peak | longest /liveness | took | answers |")
        print("| --- | --- | --- | --- | --- |")
    for name in names:
        if name == "texts":
            with launch(max_total_token_num=65536, max_req_total_len=8192) as server:
                asyncio.run(texts(server))
            continue
        with launch(preexec=soft_limit) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            asyncio.run(attack(server, name))


if __name__ == "__main__":
    main()
