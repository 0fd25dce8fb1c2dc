"""The answer whose audio has been through a SoundOut."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Send

from light_tts.server.httpserver.audio_response import CallResponse, Explain
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.captions import Word, as_dicts, word_times
from light_tts.server.httpserver.sound.out import SoundOut

MAX_TIMES_HEADER = 4096  # bytes


def times_header(words: list[Word]) -> dict[str, str]:
    """As vLLM-Omni sends them; too many are left out, which another header says."""
    text = json.dumps(as_dicts(words), separators=(",", ":"))
    if len(text) > MAX_TIMES_HEADER:
        return {"X-Word-Timestamps-Omitted": "too-large"}
    return {"X-Word-Timestamps": text}


class SoundResponse(CallResponse):
    """In one piece with its length where the sound is `whole`, else bit by bit, as it is made."""

    def __init__(
        self, call: SpeechCall, sound: SoundOut, explain: Explain, word_times: bool = False, **headers: str
    ) -> None:
        """`word_times`: say in a header when each word is spoken, where the answer is whole."""
        headers = {"X-Sample-Rate": str(sound.sample_rate), **headers}
        super().__init__(call, sound.content_type, headers, explain)
        self.sound = sound
        self._word_times = word_times
        self._spoken: list[bytes] = []  # PCM so far, where the times of words are wanted

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
        """The PCM of the stages, and the bytes of the answer."""
        pcm = b"".join([pcm async for pcm in self.call])
        self._keep(pcm)
        return pcm, await asyncio.to_thread(lambda: self.sound.push(pcm) + self.sound.finish())

    def _keep(self, pcm: bytes) -> None:
        if self._word_times:
            self._spoken.append(pcm)

    async def start_with_audio(self, send: Send) -> None:
        """The body bit by bit; the headers go with the first audio, so that an error before it has its
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
    """The whole audio in a JSON object, with the times of its words."""

    def __init__(self, call: SpeechCall, sound: SoundOut, explain: Explain, **headers: str) -> None:
        headers = {**headers, "Content-Type": "application/json"}
        super().__init__(call, sound, explain, word_times=True, **headers)

    def answer(self, audio: bytes) -> dict[str, Any]:
        """The object."""
        raise NotImplementedError

    async def deliver(self, send: Send) -> None:
        pcm, audio = await self.all_audio()
        body = json.dumps(self.answer(audio)).encode()
        await self.start(send, len(body))
        self.call.note_sent(pcm)
        await self.write(send, body)
