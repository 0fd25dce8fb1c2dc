"""The answer of POST /inference_zero_shot: audio as it comes, or the whole of it, or a JSON error."""

from __future__ import annotations

import asyncio
import logging

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from light_tts.server.httpserver import audio_out
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.errors import RequestError

# A client that has stopped reading is cut off this long after the deadline.
GRACE_SECONDS = 5.0

log = logging.getLogger("light_tts.http")


class AudioResponse(Response):
    """Owns the call from now on and closes it. An error before the first byte becomes a JSON answer with its
    status; after it, the connection is closed without the terminating chunk, which clients report as an
    incomplete body. A client that goes away ends the call at once."""

    def __init__(self, call: SpeechCall, format: str, stream: bool, sample_rate: int, seed: int) -> None:
        super().__init__()
        self._call = call
        self._format = format
        self._stream = stream
        self._sample_rate = sample_rate
        self._headers = {
            "Content-Type": audio_out.content_type(format, sample_rate),
            "X-Sample-Rate": str(sample_rate),
            "X-Request-Id": call.id,
            "X-Seed": str(seed),
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call
        delivery = asyncio.create_task(self._deliver(scope, receive, send))
        departure = asyncio.create_task(_until_disconnected(receive))
        try:
            await asyncio.wait(
                {delivery, departure},
                timeout=max(0.0, call.remaining) + GRACE_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if delivery.done():
                delivery.result()
            elif departure.done():
                call.close("disconnected")
            else:
                call.close("timeout")
        except OSError:
            call.close("disconnected")
        finally:
            delivery.cancel()
            departure.cancel()
            await asyncio.gather(delivery, departure, return_exceptions=True)
            call.close()

    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            if self._stream:
                async for pcm in self._call:
                    if not started:
                        started = True
                        await self._start(send, None)
                    await self._send(send, pcm)
                if not started:
                    await self._start(send, 0)
            else:
                pcm = b"".join([pcm async for pcm in self._call])
                started = True
                await self._start(send, len(pcm))
                await self._send(send, pcm)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except RequestError as error:
            if started:
                log.error("%s cut off after the first byte: %s", self._call.id, error.message)
            else:
                headers = {"X-Request-Id": self._call.id, **error.headers}
                answer = JSONResponse({"message": error.message}, error.status, headers)
                await answer(scope, receive, send)

    async def _start(self, send: Send, pcm_bytes: int | None) -> None:
        """`pcm_bytes` None: not known yet."""
        head = audio_out.header(self._format, self._sample_rate, pcm_bytes)
        headers = dict(self._headers)
        if pcm_bytes is not None:
            headers["Content-Length"] = str(len(head) + pcm_bytes)
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        if head:
            await send({"type": "http.response.body", "body": head, "more_body": True})

    async def _send(self, send: Send, pcm: bytes) -> None:
        if pcm:
            self._call.note_sent(pcm)
            await send({"type": "http.response.body", "body": pcm, "more_body": True})


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
