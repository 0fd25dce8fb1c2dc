"""Generates speech with a running server."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import httpx
import numpy as np
import websockets

from light_tts.tools.evaluation.endings import expected_seconds
from light_tts.tools.evaluation.lines import Line
from light_tts.tools.evaluation.sound import Sound
from light_tts.tools.evaluation.takes import Take

MODES = ("whole", "stream", "bistream")
TOKENS_PER_SECOND = 25
SAMPLE_RATE = 24_000  # assumed if the response does not say
LONGEST = 3.0  # multiple of the expected length at which speech is considered runaway
SHORTEST_LIMIT = 2.0  # seconds
WORDS_OF_A_PIECE = 3  # in bistream


class SpeechError(Exception):
    """The server produced no speech; the message says why."""


FAILURES = (SpeechError, httpx.HTTPError, websockets.WebSocketException, OSError, asyncio.TimeoutError)


@dataclass(frozen=True)
class Server:
    """A running server. `mode`: one of MODES; `style`: the server's `tts_model_name`; `timeout`: seconds
    without data after which a request has failed."""

    url: str
    mode: str = "whole"
    style: str = "default"
    timeout: float = 300.0

    async def check(self) -> None:
        """Raise SpeechError if no server answers."""
        try:
            async with httpx.AsyncClient(base_url=self.url, timeout=self.timeout) as client:
                (await client.get("/liveness")).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SpeechError(f"no server at {self.url}: {error}") from None

    async def speak_all(
        self, lines: list[Line], seed: int, concurrency: int, done: Callable[[Take], None]
    ) -> list[Take]:
        """Speak line i with seed `seed + i`, `concurrency` at a time; `done` is called with each take."""
        takes: dict[int, Take] = {}
        waiting = iter(enumerate(lines))

        async def client() -> None:
            for index, line in waiting:
                takes[index] = await self.speak(line, seed + index)
                done(takes[index])

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return [take for _, take in sorted(takes.items())]

    async def speak(self, line: Line, seed: int) -> Take:
        """Speak one line; failures are reported in the take's `error`."""
        tokens = math.ceil(TOKENS_PER_SECOND * max(LONGEST * expected_seconds(line), SHORTEST_LIMIT))
        fields = {
            "prompt_text": line.prompt_text,
            "seed": seed,
            "max_new_tokens": tokens,
            "tts_model_name": self.style,
        }
        ask = self._bistream if self.mode == "bistream" else self._request
        start, first, pcm, rate = time.perf_counter(), None, bytearray(), SAMPLE_RATE
        try:
            async for piece, rate in ask(line, fields):  # noqa: B007 - the last rate is used below
                first = first or time.perf_counter() - start
                pcm += piece
            wall = time.perf_counter() - start
            if not pcm or len(pcm) % 2:
                raise SpeechError(f"{len(pcm)} bytes are no 16-bit sound")
        except FAILURES as error:
            return Take(line, None, str(error) or type(error).__name__)
        wave = np.frombuffer(bytes(pcm), "<i2").astype(np.float32) / 32768
        return Take(line, Sound(wave, rate), "", wall, first, tokens / TOKENS_PER_SECOND)

    async def _request(self, line: Line, fields: dict) -> AsyncIterator[tuple[bytes, int]]:
        """Yield (PCM, sample rate)."""
        form = {**fields, "tts_text": line.text, "stream": str(self.mode == "stream").lower()}
        prompt_wav, _ = line.prompt
        recording = {"prompt_wav": (prompt_wav.name, prompt_wav.read_bytes())}
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=self.timeout) as client,
            client.stream("POST", "/inference_zero_shot", data=form, files=recording) as answer,
        ):
            if answer.status_code != 200:
                raise SpeechError(f"HTTP {answer.status_code}: {(await answer.aread()).decode()}")
            rate = int(answer.headers.get("x-sample-rate", SAMPLE_RATE))
            async for piece in answer.aiter_bytes():
                if piece:
                    yield piece, rate

    async def _bistream(self, line: Line, fields: dict) -> AsyncIterator[tuple[bytes, int]]:
        """The same, with the text sent in pieces."""
        url = re.sub("^http", "ws", self.url).rstrip("/") + "/inference_zero_shot_bistream"
        async with websockets.connect(url, max_size=None, open_timeout=self.timeout) as socket:
            assert socket.response is not None  # it is connected
            rate = int(socket.response.headers.get("x-sample-rate", SAMPLE_RATE))
            await socket.send(json.dumps(fields))
            await socket.send(line.prompt[0].read_bytes())
            for piece in pieces(line.text):
                await socket.send(json.dumps({"tts_text": piece}))
            await socket.send(json.dumps({"finish": True}))
            while True:
                try:
                    message = await asyncio.wait_for(socket.recv(), self.timeout)
                except websockets.ConnectionClosedOK:
                    return
                if isinstance(message, str):
                    raise SpeechError(json.loads(message).get("error", message))
                yield message, rate


def pieces(text: str) -> Iterable[str]:
    """Split `text` into pieces of a few words, including whitespace."""
    words = re.findall(r"\s*\S+\s*", text)
    return ("".join(words[i : i + WORDS_OF_A_PIECE]) for i in range(0, len(words), WORDS_OF_A_PIECE))
