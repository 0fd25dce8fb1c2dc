"""Sends one request and receives its response chunk by chunk, with the time of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from light_tts.tools.bench.playback import Playback, play

BYTES_PER_SAMPLE = 2  # 16-bit mono PCM
SAMPLE_RATE = 24_000  # assumed if the response does not say


@dataclass
class Outcome:
    """One request from the client's point of view. `due` and `start`: when it should have been sent and when
    it was, on the clock of time.perf_counter. Other times are in seconds from `start`; `audio` is in seconds
    of sound; `pieces`: arrival time and bytes of each chunk; `error`: the kind of failure, empty if the
    response was complete."""

    index: int
    due: float
    start: float
    latency: float = 0.0
    first_audio: float = 0.0
    audio: float = 0.0
    error: str = ""
    pieces: list[tuple[float, int]] = field(default_factory=list)
    playback: Playback = field(default_factory=Playback)


@asynccontextmanager
async def open_session(url: str, timeout: float) -> AsyncIterator[aiohttp.ClientSession]:
    """Context manager for a client of the server at `url` with unlimited connections; `timeout`: seconds
    without data after which a request has failed."""
    # Shorter than the 5 s after which servers close an idle connection, so that none is closed while in use.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    silence = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    async with aiohttp.ClientSession(url, connector=connector, timeout=silence) as session:
        yield session


async def speak(session: aiohttp.ClientSession, body: dict[str, Any], index: int, due: float) -> Outcome:
    """Send request `index`, due at `due`, and receive the whole response."""
    start = time.perf_counter()
    outcome = Outcome(index, due, start)
    pieces = outcome.pieces
    try:
        async with session.post("/inference_zero_shot", **body) as response:
            if response.status != 200:
                outcome.error = f"HTTP {response.status}"
                return outcome
            sample_rate = int(response.headers.get("x-sample-rate", SAMPLE_RATE))
            async for piece in response.content.iter_any():
                pieces.append((time.perf_counter() - start, len(piece)))
        rate = sample_rate * BYTES_PER_SAMPLE
        outcome.audio = sum(size for _, size in pieces) / rate
        outcome.playback = play([(arrival, size / rate) for arrival, size in pieces])
        if pieces:
            outcome.first_audio = pieces[0][0]
        else:
            outcome.error = "no audio"
    except asyncio.TimeoutError:
        outcome.error = "timeout"
    except aiohttp.ClientConnectorError:
        outcome.error = "no connection"
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError):
        outcome.error = "incomplete answer"
    except (aiohttp.ClientError, OSError) as error:
        outcome.error = type(error).__name__
    finally:
        outcome.latency = time.perf_counter() - start
    return outcome
