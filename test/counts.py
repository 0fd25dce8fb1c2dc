"""Counts the outcome of requests while a server on this machine, started with the small checkpoint of the
tests, is killed, stopped, attacked, abandoned by clients, and used for a long time. Counts rather than times,
because the machine may be busy.

    python test/counts.py kills 50              kills of each stage, with eight streaming clients
    python test/counts.py hangs 50              stages stopped in turn, likewise
    python test/counts.py hostile 10000         malformed requests alongside two streaming clients
    python test/counts.py cancels 1000          clients that disconnect
    python test/counts.py soak 30               minutes of mixed requests: memory and files of each process
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import numpy as np
import psutil
import websockets
from support.hostile import harmed, send_all
from support.server_process import PROMPT_TEXT, PROMPT_WAV, Server, launch
from support.streams import Client, run_clients, stage_pid

PLACES = (("encode", 0), ("llm", 0), ("decode", 0), ("encode", 0), ("llm", 0), ("decode", 1))
PAUSE = (0.5, 2.5)  # seconds from ready to the next signal
HANG_TIMEOUT = 6.0
START_SECONDS = 600.0  # of a server or stage, on a machine that is busy
GAUGES = (
    "light_tts_stage_queue_depth",
    "light_tts_llm_running_requests",
    "light_tts_llm_paused_requests",
    "light_tts_llm_waiting_requests",
    "light_tts_llm_kv_slots_used",
)
LEAVING_AT_ONCE = 8
SPEAKING = 4  # clients of the soak
RECORDINGS = 16  # of the soak: more than are kept
SAMPLE_SECONDS = 15.0
Found = collections.Counter[str]


# ---------------------------------------------------------------- clients whose answers are compared


@contextlib.asynccontextmanager
async def streaming(server: Server, expected: list[np.ndarray]) -> AsyncIterator[Found]:
    """Run one client per expected response, each repeating the same stream. Yields the number of responses
    that were `identical`, within 2 of 32768 (`close`), `different` and `lost`."""
    found: Found = collections.Counter()
    over = asyncio.Event()

    async def speak(number: int) -> None:
        while not over.is_set():
            client = Client(server, number)
            try:
                samples = np.frombuffer(await client.run(), np.int16)
            except (httpx.HTTPError, AssertionError) as error:
                print(f"lost after {len(client.received)} bytes: {error!r}", flush=True)
                found["lost"] += 1
                continue
            found[compared(samples, expected[number])] += 1

    tasks = [asyncio.create_task(speak(number)) for number in range(len(expected))]
    yield found
    over.set()
    await asyncio.gather(*tasks)


def compared(samples: np.ndarray, expected: np.ndarray) -> str:
    if np.array_equal(samples, expected):
        return "identical"
    same_length = len(samples) == len(expected)
    if same_length and np.abs(samples.astype(int) - expected).max() <= 2:
        return "close"
    return "different"


# ---------------------------------------------------------------- kills and hangs


async def signals(server: Server, expected: list[np.ndarray], sent: signal.Signals, count: int) -> None:
    """Send the signal to the stages in turn, each when the previous one has recovered."""
    rng = random.Random(0)
    done: Found = collections.Counter()
    async with streaming(server, expected) as found:
        for turn in range(count):
            stage, index = PLACES[turn % len(PLACES)]
            await asyncio.sleep(rng.uniform(*PAUSE))
            pid = await asyncio.to_thread(stage_pid, server, stage, index)
            os.kill(pid, sent)
            done[stage] += 1
            while await asyncio.to_thread(stage_pid, server, stage, index) == pid:
                await asyncio.sleep(0.1)
            await asyncio.to_thread(server.wait_until_ready, START_SECONDS)
            if turn % 3 == 2:
                print(f"{dict(done)}: {dict(found)}", flush=True)
    alarms = server.output.count("has made no progress")
    print(f"{sent.name} {dict(done)}: answers {dict(found)}; taken for hung: {alarms}")


def kills(server: Server, count: int) -> None:
    asyncio.run(signals(server, run_clients(server), signal.SIGKILL, 3 * count))


def hangs(server: Server, count: int) -> None:
    asyncio.run(signals(server, run_clients(server), signal.SIGSTOP, count))


# ---------------------------------------------------------------- hostile requests


def hostile(server: Server, count: int) -> None:
    expected = run_clients(server)[:2]

    async def run() -> None:
        statuses: Found = collections.Counter()
        async with streaming(server, expected) as found:
            for batch in range(0, count, 500):
                answers = await send_all(server, min(500, count - batch), seed=batch)
                statuses.update(str(answer.status) for answer in answers)
                for answer in filter(harmed, answers):
                    print(f"seed {batch}: {answer}", flush=True)
                print(f"{batch + len(answers)}: {dict(statuses)}; beside them {dict(found)}", flush=True)
        restarts = server.metric("light_tts_stage_restarts_total")
        print(
            f"{count} hostile requests: {dict(statuses)}; beside them {dict(found)}; restarts {restarts:.0f}"
        )
        print(f"tracebacks in the log: {server.output.count('Traceback')}; {gauges(server)}")

    asyncio.run(run())


# ---------------------------------------------------------------- clients that leave


def gauges(server: Server) -> dict[str, float]:
    """Return the gauges that are not 0."""
    values = {name.removeprefix("light_tts_"): server.metric(name) for name in GAUGES}
    return {name: value for name, value in values.items() if value}


async def leave_stream(server: Server, rng: random.Random) -> None:
    """Disconnect after some bytes of a response, or before its first one."""
    fields = {"tts_text": "This is spoken for nobody.", "spk_id": "tiny_spk", "min_new_tokens": 300}
    fields |= {"max_new_tokens": 300, "stream": rng.random() < 0.7}
    async with httpx.AsyncClient(timeout=60) as http:
        answering = http.stream("POST", f"{server.url}/inference_zero_shot", json=fields)
        with_audio = rng.randrange(3)
        try:
            async with asyncio.timeout(rng.uniform(0.01, 1.0)), answering as response:
                async for _ in response.aiter_raw():
                    if not with_audio:
                        return
                    with_audio -= 1
        except TimeoutError:
            pass


async def leave_socket(server: Server, rng: random.Random) -> None:
    """Disconnect in the middle of the text or of the speech, with or without a close."""
    async with websockets.connect(f"{server.websocket_url}/inference_bistream") as connection:
        await connection.send('{"spk_id": "tiny_spk", "min_new_tokens": 200}')
        for _ in range(rng.randrange(6)):
            await connection.send('{"tts_text": "Some more words that come, "}')
        if rng.random() < 0.5:
            await connection.send('{"finish": true}')
        await asyncio.sleep(rng.uniform(0, 0.6))
        if rng.random() < 0.5:
            connection.transport.abort()


def cancels(server: Server, count: int) -> None:
    async def run() -> None:
        rng, places, failed = random.Random(0), asyncio.Semaphore(LEAVING_AT_ONCE), collections.Counter()

        async def one(number: int) -> None:
            async with places:
                try:
                    await (leave_socket if number % 3 == 0 else leave_stream)(server, rng)
                except (httpx.HTTPError, websockets.WebSocketException, OSError) as error:
                    failed[repr(error)] += 1

        await asyncio.gather(*(one(number) for number in range(count)))
        print(f"{count} clients have left; errors they saw: {dict(failed)}", flush=True)
        deadline = time.monotonic() + 30
        while gauges(server) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        outcomes = {
            outcome: server.metric("light_tts_requests_total", outcome=outcome)
            for outcome in ("ok", "disconnected", "rejected", "failed", "timeout", "busy")
        }
        print(f"outcomes: {outcomes}; gauges that are not 0: {gauges(server)}")

    asyncio.run(run())


# ---------------------------------------------------------------- soak


def role(process: psutil.Process, front: int) -> str:
    words = process.cmdline()
    if process.pid == front:
        return "front"
    if "--stage" in words:
        return f"{words[words.index('--stage') + 1]} {words[words.index('--index') + 1]}"
    module = words[words.index("-m") + 1] if "-m" in words else words[0]
    return "HTTP worker" if module.endswith("api_server") else module.rpartition(".")[2]


def held(server: Server) -> dict[str, tuple[float, float]]:
    """Return resident memory (MB) and open files of each process; `shared memory`: MB and number of its
    files."""
    front = psutil.Process(server.pid)
    result = {}
    for process in [front, *front.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            name = f"{role(process, front.pid)} ({process.pid})"
            result[name] = (process.memory_info().rss / 2**20, process.num_fds())
    files = []
    for path in Path("/dev/shm").glob(f"light_tts-{server.port}-*/*"):
        with contextlib.suppress(FileNotFoundError):  # some last for a moment
            files.append(path.stat().st_blocks * 512)
    result["shared memory"] = (sum(files) / 2**20, len(files))
    return result


async def speak_on(server: Server, number: int, until: float, found: Found) -> None:
    """Send all kinds of requests one after the other: streams, complete responses, stored voices, new and
    known recordings, WebSockets, and clients that disconnect."""
    rng = random.Random(number)
    recording = bytearray(PROMPT_WAV.read_bytes())
    while time.monotonic() < until:
        kind = rng.randrange(6)
        fields = {"tts_text": "Hello there, how are you?", "stream": str(kind % 2 == 0).lower()}
        fields |= {"min_new_tokens": "40", "max_new_tokens": "40"}
        try:
            if kind == 4:
                await leave_stream(server, rng)
            elif kind == 5:
                await leave_socket(server, rng)
            else:
                files = None
                if kind < 2:
                    fields["spk_id"] = "tiny_spk"
                else:
                    fields["prompt_text"] = PROMPT_TEXT
                    recording[-2] = rng.randrange(RECORDINGS)
                    files = {"prompt_wav": ("prompt.wav", bytes(recording))}
                async with httpx.AsyncClient(timeout=120) as http:
                    url = f"{server.url}/inference_zero_shot"
                    answer = await http.post(url, data=fields, files=files)
                    assert answer.status_code == 200, answer.text
                    assert len(answer.content) == 40 * 1920, len(answer.content)
            found["served" if kind < 4 else "left"] += 1
        except (httpx.HTTPError, websockets.WebSocketException, OSError, AssertionError) as error:
            print(f"failed: {error!r}", flush=True)
            found["failed"] += 1


def soak(server: Server, minutes: int) -> None:
    """Report slopes over the last two thirds of the time, after allocators and caches have filled."""

    async def run() -> None:
        found: Found = collections.Counter()
        begun = time.monotonic()
        until = begun + 60 * minutes
        tasks = [asyncio.create_task(speak_on(server, number, until, found)) for number in range(SPEAKING)]
        samples: dict[str, list[tuple[float, float, float]]] = collections.defaultdict(list)
        while time.monotonic() < until:
            await asyncio.sleep(SAMPLE_SECONDS)
            elapsed = time.monotonic() - begun
            for name, (megabytes, files) in (await asyncio.to_thread(held, server)).items():
                samples[name].append((elapsed, megabytes, files))
            if int(elapsed / SAMPLE_SECONDS) % 8 == 0:
                print(
                    f"{elapsed:.0f} s: {dict(found)}", {k: v[-1][1:] for k, v in samples.items()}, flush=True
                )
        await asyncio.gather(*tasks)
        print(f"{minutes} minutes: {dict(found)}; gauges that are not 0: {gauges(server)}")
        print(
            "| process | MB at the end | MB an hour | files at the end | files an hour |\n"
            + "| --- " * 5
            + "|"
        )
        for name, rows in samples.items():
            late = np.array([row for row in rows if row[0] > 60 * minutes / 3])
            if len(late) > 2:
                slopes = [np.polyfit(late[:, 0] / 3600, late[:, column], 1)[0] for column in (1, 2)]
                memory, files = (
                    f"{late[-1, 1]:.0f} | {slopes[0]:+.1f}",
                    f"{late[-1, 2]:.0f} | {slopes[1]:+.1f}",
                )
                print(f"| {name} | {memory} | {files} |")

    asyncio.run(run())


COUNTS: dict[str, Callable[[Server, int], None]] = {
    count.__name__: count for count in (kills, hangs, hostile, cancels, soak)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=COUNTS)
    parser.add_argument("number", type=int)
    args = parser.parse_args()
    hang_timeout = HANG_TIMEOUT if args.what == "hangs" else None
    flags = {"decode_process_num": 2, "httpserver_workers": 2, "hang_timeout_cpu": hang_timeout}
    with launch(timeout=START_SECONDS, **flags) as server:
        COUNTS[args.what](server, args.number)


if __name__ == "__main__":
    main()
