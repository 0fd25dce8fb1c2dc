"""Audio as server-sent events."""

from __future__ import annotations

import base64
import json
from typing import Any

from starlette.types import Send

from light_tts.server.httpserver.captions import as_dicts
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.openai.errors import error_body
from light_tts.server.httpserver.sound.response import SoundResponse


class EventResponse(SoundResponse):
    """Sends `speech.audio.delta` events with audio in base64 and finally `speech.audio.done`; an error after
    the first audio becomes `speech.audio.error`. With word times, a `speech.audio.words` event comes before
    the last one."""

    content_type = "text/event-stream; charset=utf-8"

    async def deliver(self, send: Send) -> None:
        try:
            await self.start_with_audio(send)
        except RequestError as error:
            if not self.started:
                raise
            await self._event(send, "speech.audio.error", **error_body(error))
        else:
            usage = self.call.request.usage
            if self._word_times:
                await self._event(send, "speech.audio.words", words=as_dicts(self.words()))
            await self._event(send, "speech.audio.done", usage=usage)

    async def write(self, send: Send, data: bytes) -> None:
        if data:
            await self._event(send, "speech.audio.delta", audio=base64.b64encode(data).decode())

    async def _event(self, send: Send, kind: str, **fields: Any) -> None:
        line = f"data: {json.dumps({'type': kind, **fields})}\n\n"
        await super().write(send, line.encode())
