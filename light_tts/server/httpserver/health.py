"""The /health check: real synthesis with every style and every decode process."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

import numpy as np

from light_tts.server.core.messages import SpeechOptions
from light_tts.server.httpserver.arrival import Arrival, closed_on_error
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.prompts import prompt_from_samples
from light_tts.server.httpserver.record import HEALTH
from light_tts.server.httpserver.request import WantedSpeech

TIMEOUT = 60.0  # seconds for the whole check
# The LLM assigns decode processes in rotation, so as many requests as there are processes reach them all
# unless other requests come in between. Then a few more rounds are made.
MAX_ROUNDS = 4

_RATE = 16_000
_TEXT = "Hello."
_OPTIONS = SpeechOptions(seed=0, min_new_tokens=1, max_new_tokens=8)


class Health(NamedTuple):
    """Result of a check. `stages`: names of the processes that probably caused a failure."""

    ok: bool
    message: str
    stages: tuple[str, ...] = ()


def _tone() -> np.ndarray:
    """Return (16000,) float32: one second of a voice-like tone, 150 Hz and its overtones."""
    time_axis = np.arange(_RATE, dtype=np.float64) / _RATE
    waves = [np.sin(2 * np.pi * 150 * n * time_axis) / n for n in range(1, 9)]
    return (0.2 * np.sum(waves, axis=0)).astype(np.float32)


class HealthCheck:
    """Runs at most one check at a time per worker and reuses its result for a few seconds."""

    def __init__(self, manager: HttpServerManager) -> None:
        self._manager = manager
        self._prompt = prompt_from_samples(_tone(), _RATE, "")
        self._lock = asyncio.Lock()
        self._result: Health | None = None
        self._finished = 0.0
        self._calls: list[SpeechCall] = []  # calls of the current check

    async def result(self) -> Health:
        async with self._lock:
            age = time.monotonic() - self._finished
            if self._result is None or age >= self._manager.settings.health_cache_seconds:
                self._result = await self._check()
                self._finished = time.monotonic()
            return self._result

    async def _check(self) -> Health:
        if self._manager.draining:
            return Health(False, "the server is shutting down")
        self._calls = []
        try:
            return await asyncio.wait_for(self._check_all(), TIMEOUT)
        except asyncio.TimeoutError:
            return Health(False, f"no answer within {TIMEOUT:g} s", self._suspects())
        except RequestError as error:
            return Health(False, error.message, self._suspects())

    async def _check_all(self) -> Health:
        begun = time.monotonic()
        styles = range(len(self._manager.styles))
        await asyncio.gather(*(self._speak(style) for style in styles))
        for _ in range(MAX_ROUNDS):
            silent = self._silent_since(begun)
            if not silent:
                return Health(True, "Ok")
            await asyncio.gather(*(self._speak(n % len(styles)) for n in range(len(silent))))
        silent = self._silent_since(begun)
        if not silent:
            return Health(True, "Ok")
        names = tuple(f"decode-{index}" for index in silent)
        return Health(False, f"no audio from {', '.join(names)}", names)

    def _suspects(self) -> tuple[str, ...]:
        """Return the processes given up or, if there are none, those that a call is waiting for."""
        stages = self._manager.peers.stages.values()
        names = [f"{info.stage}-{info.index}" for info in stages if info.state == "failed"]
        if names:
            return tuple(names)
        encodes = len(self._manager.peers.of("encode"))
        for request in (call.request for call in self._calls if not call.request.complete):
            if request.routed is not None:
                names.append(f"decode-{request.routed.decode}")
            else:
                names += [f"encode-{request.encode_index(encodes)}", f"llm-{request.speech.style}"]
        return tuple(dict.fromkeys(names))

    def _silent_since(self, begun: float) -> list[int]:
        """Return the decode processes that have sent no audio for any request since `begun`."""
        last_audio = self._manager.submissions.last_audio
        return [
            info.index
            for info in self._manager.peers.of("decode")
            if info.state == "failed" or last_audio.get(info.index, 0.0) < begun
        ]

    async def _speak(self, style: int) -> None:
        """Run one synthesis. It is not counted as an active request, so a busy server is healthy."""
        arrival = Arrival(self._manager, HEALTH)
        with closed_on_error(arrival):
            call = SpeechCall(
                arrival, WantedSpeech(style=style, prompt=self._prompt, options=_OPTIONS, text=_TEXT)
            )
        self._calls.append(call)
        try:
            samples = sum([len(pcm) // 2 async for pcm in call])
            if not samples:
                raise RequestError(500, f"style {self._manager.styles[style].name} gave no audio")
            call.close()
        except RequestError as error:
            call.refuse(error)
            raise
        finally:
            call.close("disconnected")
