"""The answer whose audio has been through a SoundOut."""

from __future__ import annotations

import asyncio

from starlette.types import Send

from light_tts.server.httpserver.audio_response import CallResponse, Explain
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.sound.out import SoundOut


class SoundResponse(CallResponse):
    """In one piece with its length where the sound is `whole`, else bit by bit, as it is made."""

    def __init__(self, call: SpeechCall, sound: SoundOut, explain: Explain, **headers: str) -> None:
        headers = {"X-Sample-Rate": str(sound.sample_rate), **headers}
        super().__init__(call, sound.content_type, headers, explain)
        self.sound = sound

    async def deliver(self, send: Send) -> None:
        if self.sound.whole:
            pcm = b"".join([pcm async for pcm in self.call])
            data = await asyncio.to_thread(lambda: self.sound.push(pcm) + self.sound.finish())
            await self.start(send, len(data))
            self.call.note_sent(pcm)
            await self.write(send, data)
            return
        await self.start_with_audio(send)

    async def start_with_audio(self, send: Send) -> None:
        """The body bit by bit; the headers go with the first audio, so that an error before it has its
        status."""
        async for pcm in self.call:
            data = await asyncio.to_thread(self.sound.push, pcm)
            if not self.started:
                await self.start(send, None)
            self.call.note_sent(pcm)
            await self.write(send, data)
        data = await asyncio.to_thread(self.sound.finish)
        if not self.started:
            await self.start(send, None)
        await self.write(send, data)
