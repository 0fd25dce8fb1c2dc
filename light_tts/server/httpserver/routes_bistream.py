"""WebSockets that receive text while they send audio.

/inference_zero_shot_bistream: `{"prompt_text": ..., "tts_model_name"?: ...}`, then the recording as one
binary message, then any number of `{"tts_text": ...}`, then `{"finish": true}`.
/inference_bistream: the same, but the first message names the voice with `spk_id`, or contains `prompt_wav`
in base64.

Audio is sent as binary messages of PCM, with `{"words": [...]}` between them if the first message has
`word_timestamps`; after the last one the server closes with 1000. An error is sent as `{"error": ...}` before
the close.
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import to_thread
from collections.abc import Iterator

import msgspec
from fastapi import APIRouter, WebSocket
from fastapi.exceptions import RequestValidationError
from starlette.websockets import WebSocketDisconnect

from light_tts.server.httpserver import prompts
from light_tts.server.httpserver.arrival import Arrival, closed_on_error
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.captions import Word, as_dicts
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import (
    Fields,
    Opening,
    TextMessage,
    check_text,
    describe,
    parse,
    random_seed,
    speech_options,
    wrong_field,
)
from light_tts.server.httpserver.json_socket import JsonSocket
from light_tts.server.httpserver.live_words import LiveWords, check_word_times
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.request import WantedSpeech
from light_tts.server.httpserver.sound import SoundOut, SoundWishes

IDLE_SECONDS = 60.0  # maximum silence of a client that has not finished

_UNSUPPORTED_DATA, _POLICY, _INTERNAL, _TRY_LATER = 1003, 1008, 1011, 1013

router = APIRouter()


@router.websocket("/inference_zero_shot_bistream")
async def inference_zero_shot_bistream(websocket: WebSocket) -> None:
    await BistreamSession(websocket, "zero_shot_bistream").run(prompt_follows=True)


@router.websocket("/inference_bistream")
async def inference_bistream(websocket: WebSocket) -> None:
    await BistreamSession(websocket, "bistream").run(prompt_follows=False)


@contextlib.contextmanager
def _wrong_fields_refused() -> Iterator[None]:
    """Context manager that turns RequestValidationError into RequestError (422)."""
    try:
        yield
    except RequestValidationError as error:
        raise RequestError(422, describe(error)) from None


class BistreamSession:
    """One WebSocket from accept to close."""

    def __init__(self, websocket: WebSocket, route: str) -> None:
        self._websocket = websocket
        self._manager: HttpServerManager = websocket.app.state.manager
        self._prompts: prompts.PromptReader = websocket.app.state.prompts
        self._settings = self._manager.settings
        self._arrival = Arrival(self._manager, route)
        self._socket = JsonSocket(websocket, min(IDLE_SECONDS, self._settings.request_timeout))
        self._characters = 0
        self._spoken_text = False  # whether any non-blank text has arrived
        self._seed = random_seed()  # unless the client chooses one
        self._sound: SoundOut | None = None  # None: send the samples unchanged

    async def run(self, prompt_follows: bool) -> None:
        headers = {
            "X-Request-Id": self._arrival.id,
            "X-Sample-Rate": str(self._manager.sample_rate),
            "X-Seed": str(self._seed),
        }
        raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        try:
            with closed_on_error(self._arrival), _wrong_fields_refused():
                await self._websocket.accept(headers=raw_headers)
                call = SpeechCall(self._arrival, await self._opening(prompt_follows))
            with closed_on_error(call), _wrong_fields_refused():
                await self._converse(call)
                await self._socket.close()
                call.close()
        except WebSocketDisconnect:
            pass
        except RequestError as error:
            await self._explain(error)

    # -- opening

    async def _opening(self, prompt_follows: bool) -> WantedSpeech:
        choice = await self._receive_fields(Opening)
        if prompt_follows:
            for name in ("prompt_wav", "spk_id"):
                if getattr(choice, name) is not None:
                    raise wrong_field(name, "belongs to /inference_bistream; here the recording follows")
        style = self._manager.style_index(choice.tts_model_name)
        options = speech_options(choice, self._settings.max_part_tokens, self._seed)
        if choice.word_timestamps:
            check_word_times(self._manager, style, choice.max_pause)
            options = msgspec.structs.replace(options, word_times=True)
        if choice.max_pause is not None:
            self._sound = SoundOut(SoundWishes("pcm", max_pause=choice.max_pause), self._manager.sample_rate)
        if prompt_follows:
            if choice.prompt_text is None:
                raise RequestError(400, "the first message must have prompt_text")
            choice = choice.model_copy(update={"prompt_wav": await self._receive_recording()})
        self._arrival.admit(options, stream=True)
        prompt = await self._prompts.prompt(choice)
        return WantedSpeech(style=style, prompt=prompt, options=options, stream=True, bistream=True)

    # -- the conversation

    async def _converse(self, call: SpeechCall) -> None:
        """Return when all audio has been sent."""
        listening = asyncio.create_task(self._listen(call))
        speaking = asyncio.create_task(self._speak(call))
        try:
            await asyncio.wait(
                {listening, speaking},
                timeout=max(0.0, call.remaining) + 5.0,
                return_when=asyncio.FIRST_COMPLETED,
            )
            ended = next((task for task in (speaking, listening) if task.done()), None)
            if ended is None:
                raise RequestError(504, "the client does not read its audio")
            ended.result()
        finally:
            for task in (listening, speaking):
                task.cancel()
            await asyncio.gather(listening, speaking, return_exceptions=True)

    async def _listen(self, call: SpeechCall) -> None:
        """Receive text, then only watch for a disconnect. Ends only by an exception."""
        while not call.request.text_finished:
            message = await self._receive_fields(TextMessage)
            if message.tts_text is not None:
                self._take_text(call, message.tts_text)
            if message.finish:
                if not self._spoken_text:
                    raise RequestError(400, "finish came before any tts_text")
                call.finish_text()
            elif message.tts_text is None:
                raise RequestError(400, "a message must have tts_text or finish")
        while True:
            await self._socket.receive_message(may_be_silent=True)
            raise RequestError(400, "a message came after finish")

    def _take_text(self, call: SpeechCall, text: str) -> None:
        limit = self._settings.max_text_length
        check_text("tts_text", text, limit - self._characters, may_be_empty=True)
        self._characters += len(text)
        self._spoken_text = self._spoken_text or bool(text.strip())
        if text:
            call.append_text(text)

    async def _speak(self, call: SpeechCall) -> None:
        words = LiveWords(call) if call.request.speech.options.word_times else None
        async for pcm in call:
            if pcm:
                call.note_sent(pcm)
                await self._send(pcm if self._sound is None else await to_thread(self._sound.push, pcm))
            if words is not None:
                await self._tell(await to_thread(words.hear, pcm))
        if self._sound is not None:
            await self._send(await to_thread(self._sound.finish))
        if words is not None:
            await self._tell(await to_thread(words.finish))

    async def _send(self, pcm: bytes) -> None:
        if pcm:
            await self._websocket.send_bytes(pcm)

    async def _tell(self, words: list[Word]) -> None:
        if words:
            await self._websocket.send_json({"words": as_dicts(words)})

    # -- messages

    async def _receive_fields(self, model: type[Fields]) -> Fields:
        return parse(model, await self._socket.receive())

    async def _receive_recording(self) -> bytes:
        data = (await self._socket.receive_message()).get("bytes")
        if data is None:
            raise RequestError(400, "expected the recording as a binary message")
        return data

    # -- the end

    async def _explain(self, error: RequestError) -> None:
        codes = {408: _POLICY, 429: _TRY_LATER, 503: _TRY_LATER}
        code = codes.get(error.status, _POLICY if error.status < 500 else _INTERNAL)
        if error.message.startswith(prompts.BAD_AUDIO):
            code = _UNSUPPORTED_DATA
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
            await self._websocket.send_json({"error": error.message, "status": error.status})
        await self._socket.close(code, error.message)
