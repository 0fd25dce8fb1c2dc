"""WS /v1/audio/speech/stream: incremental text, with the messages of vLLM-Omni's server.

The client sends `session.config` (again between utterances to change it), then `input.text` and `input.done`,
which ends an utterance but not the connection, and finally `session.close`. Each utterance is answered with
`audio.start`, binary audio messages, `audio.done` and `session.done`.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, WebSocket
from fastapi.exceptions import RequestValidationError

from light_tts.server.httpserver.captions import Word, as_dicts
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import parse, random_seed, speech_options
from light_tts.server.httpserver.json_socket import JsonSocket, Silence, until_first
from light_tts.server.httpserver.live import Live, SpokenUtterance, Utterance, UtteranceSettings
from light_tts.server.httpserver.live_words import check_word_times
from light_tts.server.httpserver.openai.fields import SpokenSpeech
from light_tts.server.httpserver.sound import Format, SoundOut, SoundWishes
from light_tts.server.httpserver.surface import as_request_error, explained
from light_tts.server.httpserver.wanted_voice import wanted_voice

ROUTE = "openai_stream"
IDLE_SECONDS = 60.0

router = APIRouter()


class SessionConfig(SpokenSpeech):
    """The session's settings. Fields of other servers, including `split_granularity`, are ignored: speech
    always begins as early as the text allows."""

    response_format: Format = "wav"
    stream_audio: bool = False  # stream the audio of an utterance; otherwise send it in one message
    word_timestamps: bool = False  # send audio as JSON, followed by the word times
    type: Literal["session.config"]


@router.websocket("/v1/audio/speech/stream")
async def stream(websocket: WebSocket) -> None:
    await SpeechSession(websocket).run()


class SpeechSession:
    """One WebSocket connection; receives the events of its own speech."""

    def __init__(self, websocket: WebSocket) -> None:
        self._state = websocket.app.state
        self._manager = self._state.manager
        self._socket = JsonSocket(websocket, min(IDLE_SECONDS, self._manager.settings.request_timeout))
        self._sent_bytes = 0
        self._chunks = 0
        self._words: list[Word] = []

    async def run(self) -> None:
        await self._socket.websocket.accept()
        live = None
        try:
            async with explained(self._socket, self._complain):
                live = Live(self._manager, ROUTE, await self._opening(), self)
                await until_first(asyncio.create_task(self._listen(live)), asyncio.create_task(live.run()))
                await self._socket.close()
        finally:
            if live is not None:
                live.abandon()

    async def _opening(self) -> UtteranceSettings:
        message = await self._socket.receive()
        if message.get("type") != "session.config":
            raise RequestError(400, "the first message must be session.config")
        return await self._utterance_settings(message)

    async def _utterance_settings(self, message: dict[str, Any]) -> UtteranceSettings:
        config = parse(SessionConfig, message)
        options = speech_options(config, self._manager.settings.max_part_tokens, random_seed())
        wishes = SoundWishes(
            config.response_format,
            config.sample_rate,
            speed=config.speed,
            max_pause=config.max_pause,
            whole=not config.stream_audio,
        )
        SoundOut(wishes, self._manager.sample_rate)  # raises for an unsupported format
        style = self._state.names.style(config.model)
        if config.word_timestamps:
            if not config.stream_audio or config.response_format != "pcm":
                raise RequestError(400, "word_timestamps requires stream_audio true and response_format pcm")
            check_word_times(self._manager, style, config.max_pause)
            options = msgspec.structs.replace(options, word_times=True)
        prompt = await wanted_voice(
            self._state, config.voice, config.ref_audio, config.ref_text, config.instructions
        )
        return UtteranceSettings(style, prompt, options, config.seed is not None, wishes)

    async def _listen(self, live: Live) -> None:
        """Receive messages until the connection ends; after session.close, wait for that."""
        while True:
            try:
                message = await self._socket.receive()
                if message.get("type") == "session.close":
                    live.close()
                    await asyncio.Event().wait()
                await self._take(live, message)
            except Silence:
                if not live.busy:
                    raise
            except (RequestError, RequestValidationError) as error:
                await self._complain(error)

    async def _take(self, live: Live, message: dict[str, Any]) -> None:
        match message.get("type"):
            case "session.config":
                if live.open:
                    raise RequestError(
                        400, "session.config is not allowed before the input.done of the current text"
                    )
                live.settings = await self._utterance_settings(message)
            case "input.text" if isinstance(message.get("text"), str):
                live.append(message["text"])
            case "input.text":
                raise RequestError(400, "input.text requires text")
            case "input.done":
                live.flush()
            case kind:
                raise RequestError(400, f"unknown message type {str(kind)[:64]!r}")

    async def _complain(self, error: RequestError | RequestValidationError) -> None:
        await self._socket.send({"type": "error", "message": as_request_error(error).message})

    # -- UtteranceReceiver

    async def on_begin(self, utterance: SpokenUtterance) -> None:
        self._sent_bytes = self._chunks = 0
        self._words = []
        await self._socket.send(
            {
                "type": "audio.start",
                "utterance_index": utterance.index,
                "sentence_index": 0,
                "sentence_text": utterance.text,
                "format": utterance.sound.format,
                "sample_rate": utterance.sound.sample_rate,
                **({} if utterance.words is None else {"word_timestamps": True}),
            }
        )

    async def on_audio(self, utterance: SpokenUtterance, audio: bytes, words: list[Word]) -> None:
        self._words += words
        if utterance.words is None:
            await self._socket.send(audio)
        elif audio:
            await self._send_chunk(utterance, audio, None)
        self._sent_bytes += len(audio)

    async def _send_chunk(
        self, utterance: SpokenUtterance, audio: bytes, times: list[dict[str, str | int]] | None
    ) -> None:
        """Send audio as JSON, as done if word times were requested. `times`: all words of the utterance, sent
        after its audio."""
        rate = utterance.sound.sample_rate
        begin, end = self._sent_bytes if audio else 0, self._sent_bytes + len(audio)
        await self._socket.send(
            {
                "type": "audio.chunk",
                "utterance_index": utterance.index,
                "sentence_index": 0,
                "chunk_id": self._chunks,
                "chunk_start_ms": round(500 * begin / rate),
                "chunk_end_ms": round(500 * end / rate),
                "sample_rate": rate,
                "audio_b64": base64.b64encode(audio).decode(),
                "timestamps": times,
            }
        )
        self._chunks += 1

    async def on_end(self, utterance: Utterance, error: RequestError | None) -> None:
        index = {"utterance_index": utterance.index}
        if error is not None:
            await self._complain(error)
        if utterance.begun:
            if isinstance(utterance, SpokenUtterance) and utterance.words is not None:
                await self._send_chunk(utterance, b"", None if error else as_dicts(self._words))
            end = {"type": "audio.done", **index, "sentence_index": 0, "total_bytes": self._sent_bytes}
            await self._socket.send({**end, "error": error is not None})
        await self._socket.send({"type": "session.done", **index, "total_sentences": int(utterance.begun)})
