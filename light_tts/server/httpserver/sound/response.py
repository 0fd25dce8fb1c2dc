"""Responses with audio converted by a SoundOut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from starlette.types import Send

from light_tts.server.httpserver.audio_response import CallResponse, Explain
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.captions import Word, as_dicts, word_times
from light_tts.server.httpserver.sound.out import SoundOut

MAX_TIMES_HEADER = 4096  # bytes
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


def times_header(words: list[Word]) -> dict[str, str]:
    """Return the word times in vLLM-Omni's header format; if they are too long, another header says so
    instead."""
    text = json.dumps(as_dicts(words), separators=(",", ":"))
    if len(text) > MAX_TIMES_HEADER:
        return {"X-Word-Timestamps-Omitted": "too-large"}
    return {"X-Word-Timestamps": text}


class SoundResponse(CallResponse):
    """Complete with its length if the sound is `whole`, otherwise streamed as it is generated."""

    content_type: str | None = None  # None: that of the sound

    def __init__(
        self,
        call: SpeechCall,
        sound: SoundOut,
        explain: Explain,
        headers: Mapping[str, str] = NO_HEADERS,
        word_times: bool = False,
    ) -> None:
        """`word_times`: report in a header when each word is spoken, for complete responses."""
        headers = {"X-Sample-Rate": str(sound.sample_rate), **headers}
        super().__init__(call, self.content_type or sound.content_type, headers, explain)
        self.sound = sound
        self._word_times = word_times
        self._spoken: list[bytes] = []  # PCM so far, kept if word times were requested

    async def deliver(self, send: Send) -> None:
        if self.sound.whole:
            pcm, data = await self.all_audio()
            if self._word_times:
                self.headers_before_start(times_header(self.words()))
            await self.start(send, len(data))
            self.call.note_sent(pcm)
            await self.write(send, data)
            return
        await self.start_with_audio(send)

    def words(self) -> list[Word]:
        return word_times(self.call.request, self._spoken, self.call.sample_rate, self.sound.speed)

    async def all_audio(self) -> tuple[bytes, bytes]:
        """Return the PCM of the stages and the bytes of the response, both complete."""
        pcm = b"".join([pcm async for pcm in self.call])
        self._keep(pcm)
        return pcm, await asyncio.to_thread(lambda: self.sound.push(pcm) + self.sound.finish())

    def _keep(self, pcm: bytes) -> None:
        if self._word_times:
            self._spoken.append(pcm)

    async def start_with_audio(self, send: Send) -> None:
        """Stream the body. The headers are sent with the first audio, so that an error before it gets its own
        status."""
        async for pcm in self.call:
            self._keep(pcm)
            data = await asyncio.to_thread(self.sound.push, pcm)
            if not self.started:
                await self.start(send, None)
            self.call.note_sent(pcm)
            await self.write(send, data)
        data = await asyncio.to_thread(self.sound.finish)
        if not self.started:
            await self.start(send, None)
        await self.write(send, data)


class JsonResponse(SoundResponse):
    """The complete audio in a JSON object, with word times."""

    content_type = "application/json"

    def __init__(
        self, call: SpeechCall, sound: SoundOut, explain: Explain, headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        super().__init__(call, sound, explain, headers, word_times=True)

    def answer(self, audio: bytes) -> dict[str, Any]:
        """Return the JSON object."""
        raise NotImplementedError

    async def deliver(self, send: Send) -> None:
        pcm, audio = await self.all_audio()
        body = json.dumps(self.answer(audio)).encode()
        await self.start(send, len(body))
        self.call.note_sent(pcm)
        await self.write(send, body)
