"""WS /v1/text-to-speech/{voice_id}/stream-input and multi-stream-input: text arrives incrementally, and audio
is sent in base64 as soon as the text allows. The second route supports several concurrent conversations,
identified by `context_id`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import APIRouter, WebSocket
from pydantic import BaseModel, ConfigDict

from light_tts.server.core.messages import SpeechOptions
from light_tts.server.httpserver.captions import Word
from light_tts.server.httpserver.elevenlabs.common import DEFAULT_FORMAT, VoiceSettings, error_body, wishes
from light_tts.server.httpserver.elevenlabs.speech import known_voice
from light_tts.server.httpserver.elevenlabs.timestamps import LiveAlignment
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import MAX_SEED, parse, random_seed
from light_tts.server.httpserver.json_socket import JsonSocket, Silence, until_first
from light_tts.server.httpserver.live import Live, SpokenUtterance, Utterance, UtteranceSettings
from light_tts.server.httpserver.sound import SoundOut
from light_tts.server.httpserver.surface import explained
from light_tts.server.httpserver.wanted_voice import wanted_voice

MAX_CONTEXTS = 5
IDLE_SECONDS = 20.0
MAX_IDLE_SECONDS = 180.0

router = APIRouter()


class InputMessage(BaseModel):
    """One message from the client. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    text: str | None = None
    context_id: str | None = None
    contextId: str | None = None
    voice_settings: VoiceSettings | None = None
    flush: bool | None = None
    close_context: bool | None = None
    close_socket: bool | None = None

    @property
    def context(self) -> str | None:
        return self.context_id if self.context_id is not None else self.contextId


@router.websocket("/v1/text-to-speech/{voice_id}/stream-input")
async def stream_input(websocket: WebSocket, voice_id: str) -> None:
    await InputSession(websocket, voice_id, several=False).run()


@router.websocket("/v1/text-to-speech/{voice_id}/multi-stream-input")
async def multi_stream_input(websocket: WebSocket, voice_id: str) -> None:
    await InputSession(websocket, voice_id, several=True).run()


def error_message(error: RequestError) -> dict[str, Any]:
    return {"error": error.message, "message": error.message, **error_body(error)}


class Context:
    """One conversation; receives the events of its own speech. `name` is None if the messages have no
    context_id."""

    def __init__(self, session: InputSession, name: str | None, settings: UtteranceSettings) -> None:
        self.name = name
        self.live = Live(session.manager, session.route, settings, self)
        self.closed = False
        self._socket = session.socket
        self._alignment = LiveAlignment()
        self.speaking = asyncio.create_task(self._run())
        self.speaking.add_done_callback(lambda task: task.cancelled() or task.exception())

    def close(self) -> None:
        """Finish speaking the pending text, then end."""
        if not self.closed:
            self.closed = True
            self.live.close()

    def abandon(self) -> None:
        self.speaking.cancel()
        self.live.abandon()

    async def _run(self) -> None:
        await self.live.run()
        await self._send(audio=None, isFinal=True)

    async def _send(self, **fields: Any) -> None:
        name = {} if self.name is None else {"contextId": self.name, "context_id": self.name}
        await self._socket.send({**fields, **name})

    async def on_begin(self, utterance: SpokenUtterance) -> None:
        """Sends nothing: the protocol has no message before the first audio."""

    async def on_audio(self, utterance: SpokenUtterance, audio: bytes, words: list[Word]) -> None:
        times = self._alignment.of(words)
        data = base64.b64encode(audio).decode()
        await self._send(audio=data, isFinal=False, alignment=times, normalizedAlignment=times)

    async def on_end(self, utterance: Utterance, error: RequestError | None) -> None:
        if isinstance(utterance, SpokenUtterance) and utterance.words is not None:
            self._alignment.next_utterance(utterance.words.seconds)
        if error is not None:
            await self._send(**error_message(error))


class InputSession:
    """One WebSocket connection."""

    def __init__(self, websocket: WebSocket, voice_id: str, several: bool) -> None:
        self._state = websocket.app.state
        self.manager = self._state.manager
        self.route = "elevenlabs_multi_stream" if several else "elevenlabs_stream"
        self._voice_id = voice_id
        self._several = several
        query = websocket.query_params
        self._output_format = query.get("output_format", DEFAULT_FORMAT)
        self._seed = query.get("seed")
        idle = query.get("inactivity_timeout", "")
        seconds = float(idle) if idle.isascii() and idle.isdigit() and idle != "0" else IDLE_SECONDS
        self.socket = JsonSocket(websocket, min(seconds, MAX_IDLE_SECONDS))
        self._contexts: dict[str | None, Context] = {}

    async def run(self) -> None:
        await self.socket.websocket.accept()
        try:
            async with explained(self.socket, self._explain):
                settings = await self._utterance_settings()
                await self._listen(settings)
                await self.socket.close()
        finally:
            for context in self._contexts.values():
                context.abandon()

    async def _explain(self, error: RequestError) -> None:
        await self.socket.send(error_message(error))

    async def _utterance_settings(self) -> UtteranceSettings:
        sound = wishes(self._output_format, None)
        SoundOut(sound, self.manager.sample_rate)  # raises for an unsupported format
        seed = self._seed
        if seed is not None and not (seed.isascii() and seed.isdigit() and int(seed[:11]) <= MAX_SEED):
            raise RequestError(400, f"seed must be an integer up to {MAX_SEED}", field="seed")
        word_times = self.manager.knows_word_times(0)
        options = SpeechOptions(seed=random_seed() if seed is None else int(seed), word_times=word_times)
        prompt = await wanted_voice(self._state, await known_voice(self._state, self._voice_id))
        return UtteranceSettings(0, prompt, options, seed is not None, sound)

    async def _listen(self, settings: UtteranceSettings) -> None:
        """Receive messages until the client is done and all its text has been spoken."""
        while True:
            message = await self._receive()
            if message.close_socket:
                for context in self._contexts.values():
                    context.close()
            else:
                try:
                    self._take(message, settings)
                except RequestError as error:
                    if not self._several:
                        raise
                    await self.socket.send({**error_message(error), "contextId": message.context})
            if message.close_socket or (not self._several and message.text == ""):
                await self._finish()
                return

    async def _finish(self) -> None:
        """Wait until the pending text has been spoken; ends early if the client disconnects."""
        await until_first(asyncio.create_task(self._all_spoken()), asyncio.create_task(self._watch()))

    async def _all_spoken(self) -> None:
        await asyncio.gather(*(context.speaking for context in self._contexts.values()))

    async def _watch(self) -> None:
        """Receive and ignore further messages, to notice a disconnect."""
        while True:
            with contextlib.suppress(RequestError):
                await self.socket.receive()

    async def _receive(self) -> InputMessage:
        while True:
            try:
                return parse(InputMessage, await self.socket.receive())
            except Silence:
                if not any(context.live.busy for context in self._contexts.values()):
                    raise

    def _take(self, message: InputMessage, settings: UtteranceSettings) -> None:
        name = message.context if self._several else None
        context = self._contexts.get(name)
        if context is not None and context.speaking.done():
            context.speaking.result()
            del self._contexts[name]
            context = None
        if message.close_context and context is None:
            return
        if context is None:
            if not message.text:  # keep-alive message
                return
            context = self._open(name, settings)
        if message.voice_settings is not None:
            sound = wishes(self._output_format, message.voice_settings)
            known = sound.max_pause is None and self.manager.knows_word_times(0)  # else pauses move the words
            options = msgspec.structs.replace(context.live.settings.options, word_times=known)
            context.live.settings = replace(context.live.settings, wishes=sound, options=options)
        if message.text and not context.closed:
            context.live.append(message.text)
        if message.close_context or (not self._several and message.text == ""):
            context.close()
        elif message.flush and context.live.open:
            context.live.flush()

    def _open(self, name: str | None, settings: UtteranceSettings) -> Context:
        for old in [old for old, context in self._contexts.items() if context.speaking.done()]:
            del self._contexts[old]
        if len(self._contexts) >= MAX_CONTEXTS:
            raise RequestError(400, f"{MAX_CONTEXTS} contexts are already open; close one with close_context")
        if name is not None and len(name) > 128:
            raise RequestError(400, "context_id is longer than 128 characters")
        context = self._contexts[name] = Context(self, name, settings)
        return context
