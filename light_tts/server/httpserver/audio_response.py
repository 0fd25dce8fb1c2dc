"""Responses whose body is the audio of a call, streamed or complete, or an error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from light_tts.server.httpserver import audio_out
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.errors import RequestError

# A client that has stopped reading is disconnected this long after the deadline.
GRACE_SECONDS = 5.0

log = logging.getLogger("light_tts.http")


Explain = Callable[[RequestError, Mapping[str, str]], Response]  # (error, headers) -> error response


def explain(error: RequestError, headers: Mapping[str, str]) -> Response:
    """Return the error response of the native routes."""
    return JSONResponse({"message": error.message}, error.status, headers)


class CallResponse(Response):
    """Base class of audio responses. Takes ownership of the call and closes it.

    An error before the first byte becomes a response with its status. After the first byte, the connection is
    closed without the terminating chunk, which clients report as an incomplete body. The call ends at once if
    the client disconnects.
    """

    def __init__(
        self,
        call: SpeechCall,
        content_type: str,
        headers: Mapping[str, str],
        explain: Explain = explain,
    ) -> None:
        """`explain`: builds the response for an error before the first byte."""
        super().__init__()
        self.call = call
        self._explain = explain
        self._answer_headers = {
            "Content-Type": content_type,
            "X-Request-Id": call.id,
            "Cache-Control": "no-store",
            **headers,
        }
        self.started = False

    async def deliver(self, send: Send) -> None:
        """Send the whole response with `start` and `write`. Raises RequestError."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self.call
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
        try:
            await self.deliver(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except RequestError as error:
            if self.started:
                log.error("%s cut off after the first byte: %s", self.call.id, error.message)
            else:
                answer = self._explain(error, {"X-Request-Id": self.call.id, **error.headers})
                await answer(scope, receive, send)

    def headers_before_start(self, headers: Mapping[str, str]) -> None:
        """Add headers before the response is started."""
        self._answer_headers.update(headers)

    async def start(self, send: Send, length: int | None) -> None:
        """Send status and headers. `length`: size of the body in bytes, None if unknown."""
        self.started = True
        headers = dict(self._answer_headers)
        if length is not None:
            headers["Content-Length"] = str(length)
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def write(self, send: Send, data: bytes) -> None:
        if data:
            await send({"type": "http.response.body", "body": data, "more_body": True})


class AudioResponse(CallResponse):
    """The samples as received from the stages, as PCM or WAV."""

    def __init__(self, call: SpeechCall, format: str, stream: bool, sample_rate: int, seed: int) -> None:
        headers = {"X-Sample-Rate": str(sample_rate), "X-Seed": str(seed)}
        super().__init__(call, audio_out.content_type(format, sample_rate), headers)
        self._format = format
        self._stream = stream
        self._sample_rate = sample_rate

    async def deliver(self, send: Send) -> None:
        if self._stream:
            async for pcm in self.call:
                if not self.started:
                    await self._begin(send, None)
                await self._send(send, pcm)
            if not self.started:
                await self._begin(send, 0)
        else:
            pcm = b"".join([pcm async for pcm in self.call])
            await self._begin(send, len(pcm))
            await self._send(send, pcm)

    async def _begin(self, send: Send, pcm_bytes: int | None) -> None:
        """Send the headers and the WAV header, if any. `pcm_bytes` None: unknown length."""
        head = audio_out.header(self._format, self._sample_rate, pcm_bytes)
        await self.start(send, None if pcm_bytes is None else len(head) + pcm_bytes)
        await self.write(send, head)

    async def _send(self, send: Send, pcm: bytes) -> None:
        if pcm:
            self.call.note_sent(pcm)
            await self.write(send, pcm)


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
