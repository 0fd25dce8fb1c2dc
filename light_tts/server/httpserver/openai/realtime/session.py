"""WS /v1/realtime: one session.

Text-to-speech only: a response speaks the last text of the conversation, or that of its own `input`. There is
no speech recognition and no language model that answers. Responses are spoken in the order in which they were
requested.
"""

from __future__ import annotations

import base64
from asyncio import create_task
from typing import Any

import msgspec
from fastapi import APIRouter, WebSocket
from fastapi.exceptions import RequestValidationError

from light_tts.server.httpserver.captions import Word
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import check_text, parse, random_seed, speech_options
from light_tts.server.httpserver.json_socket import JsonSocket, Silence, until_first
from light_tts.server.httpserver.live import Live, SpokenUtterance, Utterance, UtteranceSettings
from light_tts.server.httpserver.openai.errors import error_body
from light_tts.server.httpserver.openai.realtime import beta
from light_tts.server.httpserver.openai.realtime.conversation import (
    Conversation,
    as_object,
    new_id,
    text_of,
)
from light_tts.server.httpserver.openai.realtime.fields import MAX_ID, Item, ResponseFields, SessionFields
from light_tts.server.httpserver.openai.realtime.response import Response
from light_tts.server.httpserver.sound import SoundOut
from light_tts.server.httpserver.surface import as_request_error, explained
from light_tts.server.httpserver.wanted_voice import wanted_voice

ROUTE = "openai_realtime"
IDLE_SECONDS = 900.0
MAX_RESPONSES = 16  # being spoken or waiting
NO_EARS = "this server only speaks text: send conversation.item.create with content of type input_text"

router = APIRouter()


@router.websocket("/v1/realtime")
async def realtime(websocket: WebSocket) -> None:
    await RealtimeSession(websocket).run()


class RealtimeSession:
    """One WebSocket connection; receives the events of its own speech."""

    def __init__(self, websocket: WebSocket) -> None:
        self._state = websocket.app.state
        self._manager = self._state.manager
        self._socket = JsonSocket(websocket, IDLE_SECONDS)
        self._protocols: list[str] = websocket.scope["subprotocols"]
        self._beta = beta.wanted(websocket.headers, self._protocols)
        self._model = websocket.query_params.get("model", "gpt-realtime")
        self._id = new_id("sess")
        self._fields = SessionFields()
        self._conversation = Conversation()
        self._responses: dict[Utterance, Response] = {}  # in the order in which they are spoken
        self._live: Live | None = None

    async def run(self) -> None:
        # A browser requires one of the subprotocols that it offers.
        await self._socket.websocket.accept("realtime" if "realtime" in self._protocols else None)
        try:
            async with explained(self._socket, self._complain):
                settings = await self._utterance_settings(self._fields)
                self._live = live = Live(self._manager, ROUTE, settings, self)
                await self._send("session.created", session=self._session())
                await until_first(create_task(self._listen(live)), create_task(live.run()))
        finally:
            if self._live is not None:
                self._live.abandon()

    async def _utterance_settings(self, fields: SessionFields) -> UtteranceSettings:
        # Clients of OpenAI name a conversational model; it stands for the default style.
        style = 0 if "realtime" in self._model else self._state.names.style(self._model)
        options = speech_options(fields, self._manager.settings.max_part_tokens, random_seed())
        options = msgspec.structs.replace(options, report=True)  # for the usage
        SoundOut(fields.wishes, self._manager.sample_rate)  # raises for an unsupported format
        prompt = await wanted_voice(self._state, fields.voice)
        return UtteranceSettings(style, prompt, options, fields.seed is not None, fields.wishes)

    def _session(self) -> dict[str, Any]:
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self._id,
            "model": self._model,
            "output_modalities": ["audio"],
            "instructions": self._fields.instructions or "",
            "audio": self._fields.view(),
            "tools": [],
            "max_output_tokens": "inf",
        }

    # -- client events

    async def _listen(self, live: Live) -> None:
        """Receive events until the connection ends."""
        while True:
            message: dict[str, Any] = {}
            try:
                message = await self._socket.receive()
                await self._take(message, live)
            except Silence:
                if not live.busy:
                    raise
            except (RequestError, RequestValidationError) as error:
                await self._complain(error, message.get("event_id"))

    async def _take(self, message: dict[str, Any], live: Live) -> None:
        match message.get("type"):
            case "session.update":
                fields = self._fields.updated(parse(SessionFields, message.get("session")))
                live.settings = await self._utterance_settings(fields)
                self._fields = fields
                await self._send("session.updated", session=self._session())
            case "conversation.item.create":
                item = self._item(message.get("item"))
                before = self._conversation.add(item)
                await self._send("conversation.item.added", previous_item_id=before, item=item)
                await self._send("conversation.item.done", previous_item_id=before, item=item)
            case "conversation.item.retrieve":
                found = self._conversation.get(message.get("item_id"))
                await self._send("conversation.item.retrieved", item=found)
            case "conversation.item.delete":
                gone = self._conversation.delete(message.get("item_id"))
                await self._send("conversation.item.deleted", item_id=gone)
            case "response.create":
                await self._respond(parse(ResponseFields, message.get("response") or {}), live)
            case "response.cancel":
                live.cancel(self._response(message.get("response_id")).utterance)
            case str(kind) if kind.startswith("input_audio_buffer."):
                raise RequestError(400, NO_EARS, field="type")
            case kind:
                raise RequestError(400, f"unknown event type {str(kind)[:64]!r}", field="type")

    def _item(self, values: Any) -> dict[str, Any]:
        """Return a valid item. Raises RequestError, RequestValidationError."""
        item = parse(Item, values)
        check_text("text", item.text, self._manager.settings.max_text_length, may_be_empty=True)
        return as_object(item)

    async def _respond(self, fields: ResponseFields, live: Live) -> None:
        if len(self._responses) >= MAX_RESPONSES:
            raise RequestError(400, f"{MAX_RESPONSES} responses are waiting already")
        text = self._text(fields)
        spoken_as, settings = self._fields, live.settings
        if fields.differs:
            spoken_as = self._fields.updated(fields)
            settings = await self._utterance_settings(spoken_as)
        utterance = live.say(text, settings)
        conversation = None if fields.conversation == "none" else self._conversation.id
        response = Response(utterance, spoken_as, conversation, fields.metadata)
        self._responses[utterance] = response
        await self._send("response.created", response=response.begun())

    def _text(self, fields: ResponseFields) -> str:
        """Return the text to speak. Raises RequestError, RequestValidationError."""
        if fields.input is None:
            text = self._conversation.last_text
        else:
            items = [
                self._conversation.get(entry.get("id"))
                if entry.get("type") == "item_reference"
                else self._item(entry)
                for entry in fields.input
            ]
            text = next((text for item in reversed(items) if (text := text_of(item))), "")
        if not text:
            raise RequestError(
                400,
                "there is no text to speak: a response says the last text of the conversation, or of its "
                "input, from a user or assistant; instructions have no effect",
                field="response.input",
            )
        return text

    def _response(self, name: object) -> Response:
        """Return the response with this id (None: the one being spoken). Raises RequestError (400)."""
        for response in self._responses.values():
            if name in (None, response.id):
                return response
        raise RequestError(400, "there is no such response to cancel", field="response_id")

    # -- server events

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": new_id("event"), **fields}
        shown = beta.as_beta(event) if self._beta else event
        if shown is not None:
            await self._socket.send(shown)

    async def _complain(self, error: RequestError | RequestValidationError, event_id: object = None) -> None:
        """Send an error event. `event_id`: the client event that it refers to."""
        about = event_id[:MAX_ID] if isinstance(event_id, str) else None
        body = error_body(as_request_error(error))["error"]
        await self._send("error", error={**body, "event_id": about})

    # -- UtteranceReceiver

    async def on_begin(self, utterance: SpokenUtterance) -> None:
        response = self._responses[utterance]
        item = response.item
        output = {"response_id": response.id, "output_index": 0}
        await self._send("response.output_item.added", **output, item=item)
        if response.conversation is not None:
            before = self._conversation.add(item)
            await self._send("conversation.item.added", previous_item_id=before, item=item)
        part = {"type": "audio", "transcript": ""}
        await self._send("response.content_part.added", **response.in_output, part=part)
        await self._send("response.output_audio_transcript.delta", **response.in_output, delta=utterance.text)

    async def on_audio(self, utterance: SpokenUtterance, audio: bytes, words: list[Word]) -> None:
        where = self._responses[utterance].in_output
        await self._send("response.output_audio.delta", **where, delta=base64.b64encode(audio).decode())

    async def on_end(self, utterance: Utterance, error: RequestError | None) -> None:
        response = self._responses.pop(utterance)
        if utterance.begun:
            response.finish_item(error)
            where, item, text = response.in_output, response.item, response.utterance.text
            await self._send("response.output_audio.done", **where)
            await self._send("response.output_audio_transcript.done", **where, transcript=text)
            part = {"type": "audio", "transcript": text}
            await self._send("response.content_part.done", **where, part=part)
            await self._send("response.output_item.done", response_id=response.id, output_index=0, item=item)
            if response.conversation is not None:
                await self._send("conversation.item.done", item=item)
        await self._send("response.done", response=response.ended(error))
