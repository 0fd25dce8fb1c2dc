"""OpenAI's Realtime API, spoken by OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection
from support.server_process import Server
from websockets.sync.client import connect

EXACT = {"min_new_tokens": 40, "max_new_tokens": 40, "seed": 3}  # 1.6 s
LONG = {"min_new_tokens": 400, "max_new_tokens": 400}


class Talk:
    """The events that the client reads, each checked against the client's own types."""

    def __init__(self, connection: AsyncRealtimeConnection) -> None:
        self.connection = connection

    async def event(self) -> Any:
        raw = await asyncio.wait_for(self.connection.recv_bytes(), 60)
        event = self.connection.parse_event(raw)
        return type(event).model_validate_json(raw)

    async def until(self, kind: str) -> list[Any]:
        events = []
        while not events or events[-1].type != kind:
            events.append(await self.event())
        return events

    async def say(self, text: str) -> None:
        content = [{"type": "input_text", "text": text}]
        await self.connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": content}
        )
        await self.until("conversation.item.done")
        await self.connection.response.create()


def talk(server: Server, act: Callable[[Talk], Awaitable[None]]) -> None:
    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Talk]:
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
        async with client.realtime.connect(model="gpt-realtime") as connection:
            talk = Talk(connection)
            assert (await talk.event()).type == "session.created"
            yield talk

    async def run() -> None:
        async with opened() as talk:
            await act(talk)

    asyncio.run(run())


def audio_of(events: list[Any]) -> bytes:
    return b"".join(base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta")


def test_a_text_is_spoken(server):
    async def act(talk: Talk) -> None:
        output = {"voice": "tiny_spk", "format": {"type": "audio/pcm", "rate": 24000}}
        session = {"type": "realtime", "instructions": "Be brief.", "audio": {"output": output}}
        await talk.connection.session.update(session={**session, **EXACT})
        updated = await talk.event()
        assert updated.type == "session.updated" and updated.session.audio.output.voice == "tiny_spk"
        await talk.say("Hello there, how are you?")
        events = await talk.until("response.done")
        kinds = [event.type for event in events]
        chunks = kinds.count("response.output_audio.delta")
        assert kinds == [
            "response.created",
            "response.output_item.added",
            "conversation.item.added",
            "response.content_part.added",
            "response.output_audio_transcript.delta",
            *["response.output_audio.delta"] * chunks,
            "response.output_audio.done",
            "response.output_audio_transcript.done",
            "response.content_part.done",
            "response.output_item.done",
            "conversation.item.done",
            "response.done",
        ]
        samples = np.frombuffer(audio_of(events), "<i2")
        assert len(samples) == pytest.approx(1.6 * 24_000, abs=1000) and np.abs(samples).max() > 0
        done = events[-1].response
        assert done.status == "completed" and done.usage.output_tokens == 40
        assert done.usage.input_tokens > 0 and done.usage.output_token_details.audio_tokens == 40
        assert done.output[0].content[0].transcript == "Hello there, how are you?"

    talk(server, act)


def test_responses_of_their_own_input_come_one_after_the_other(server):
    async def act(talk: Talk) -> None:
        for index, kind in enumerate(("audio/pcmu", "audio/pcm")):
            content = [{"type": "input_text", "text": "Hello there."}]
            audio = {"output": {"format": {"type": kind}, "voice": {"id": "tiny_spk"}}}
            await talk.connection.response.create(
                response={
                    "conversation": "none",
                    "input": [{"type": "message", "role": "user", "content": content}],
                    "audio": audio,
                    "metadata": {"index": str(index)},
                    **EXACT,
                }
            )
        first, second = await talk.until("response.done"), await talk.until("response.done")
        assert len(audio_of(first)) == pytest.approx(1.6 * 8000, abs=400)  # a byte a sample
        assert len(audio_of(second)) == pytest.approx(1.6 * 48_000, abs=2000)
        assert [events[-1].response.metadata["index"] for events in (first, second)] == ["0", "1"]
        assert second[-1].response.conversation_id is None
        assert "conversation.item.added" not in {event.type for event in first + second}

    talk(server, act)


def test_a_response_is_cancelled(server):
    async def act(talk: Talk) -> None:
        await talk.connection.session.update(session={"type": "realtime", **LONG})
        await talk.say("One two three four five six seven eight nine ten.")
        await talk.until("response.output_audio.delta")
        await talk.connection.response.cancel()
        events = await talk.until("response.done")
        assert events[-1].response.status == "cancelled"
        assert events[-1].response.status_details.reason == "client_cancelled"
        assert events[-1].response.output[0].status == "incomplete"
        await talk.connection.response.cancel()
        assert "no such response" in (await talk.event()).error.message
        await talk.connection.response.create(response=EXACT)  # once more, the same text
        events = await talk.until("response.done")
        assert events[-1].response.status == "completed" and len(audio_of(events)) > 70_000

    talk(server, act)


def test_errors_leave_the_session_open(server):
    async def act(talk: Talk) -> None:
        picture = {"type": "input_image", "image_url": "data:image/png;base64,aaaa"}
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"type": "dance"}, "unknown event type 'dance'"),
            ({"type": "input_audio_buffer.append", "audio": "aaaa"}, "only speaks text"),
            ({"type": "response.create"}, "no text to speak"),
            ({"type": "response.create", "response": {"output_modalities": ["text"]}}, "must have audio"),
            ({"type": "session.update", "session": {"audio": {"output": {"voice": "nobody"}}}}, "nobody"),
            ({"type": "session.update", "session": {"audio": {"output": {"speed": 9}}}}, "speed"),
            ({"type": "session.update", "session": {"audio": 3}}, "audio.output"),
            (
                {
                    "type": "conversation.item.create",
                    "item": {"type": "message", "role": "user", "content": [picture]},
                },
                "only speaks text",
            ),
            ({"type": "conversation.item.retrieve", "item_id": "none"}, "no item 'none'"),
        ]
        for index, (message, reason) in enumerate(wrong):
            await talk.connection.send({**message, "event_id": f"mine-{index}"})  # type: ignore[arg-type]
            event = await talk.event()
            assert event.type == "error" and event.error.event_id == f"mine-{index}"
            assert reason in event.error.message and event.error.type == "invalid_request_error"
        await talk.connection.send_raw("[]")
        assert "JSON object" in (await talk.event()).error.message
        await talk.connection.session.update(session={"type": "realtime", **EXACT})
        await talk.say("Hello there.")
        assert (await talk.until("response.done"))[-1].response.status == "completed"

    talk(server, act)


def test_items_are_kept(server):
    async def act(talk: Talk) -> None:
        item = {"id": "a", "type": "message", "role": "assistant"}
        text = {"type": "output_text", "text": "Hello there."}
        await talk.connection.conversation.item.create(item={**item, "content": [text]})  # type: ignore[arg-type]
        await talk.until("conversation.item.done")
        await talk.connection.conversation.item.retrieve(item_id="a")
        assert (await talk.event()).item.content[0].text == "Hello there."
        reference = {"type": "item_reference", "id": "a"}
        await talk.connection.response.create(response={"input": [reference], **EXACT})  # type: ignore[arg-type]
        assert (await talk.until("response.done"))[-1].response.status == "completed"
        await talk.connection.conversation.item.delete(item_id="a")
        assert (await talk.event()).item_id == "a"
        await talk.connection.response.create()
        assert "no text to speak" in (await talk.event()).error.message

    talk(server, act)


@pytest.mark.parametrize("browser", [False, True])
def test_the_names_of_the_beta(server, browser):
    offer: dict[str, Any] = {"additional_headers": {"OpenAI-Beta": "realtime=v1"}}
    if browser:
        offer = {"subprotocols": ["realtime", "openai-insecure-api-key.none", "openai-beta.realtime-v1"]}
    with connect(f"{server.websocket_url}/v1/realtime?model=gpt-4o-realtime-preview", **offer) as socket:
        assert socket.subprotocol == ("realtime" if browser else None)
        session = json.loads(socket.recv(timeout=10))["session"]
        assert session["modalities"] == ["audio", "text"] and session["output_audio_format"] == "pcm16"
        changes = {"voice": "tiny_spk", "output_audio_format": "g711_alaw", **EXACT}
        socket.send(json.dumps({"type": "session.update", "session": changes}))
        assert json.loads(socket.recv(timeout=10))["session"]["output_audio_format"] == "g711_alaw"
        content = [{"type": "input_text", "text": "Hello there."}]
        item = {"type": "message", "role": "user", "content": content}
        socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        socket.send(json.dumps({"type": "response.create"}))
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] != "response.done":
            events.append(json.loads(socket.recv(timeout=60)))
    kinds = {event["type"] for event in events}
    assert {"conversation.item.created", "response.audio.done", "response.audio_transcript.done"} <= kinds
    audio = [base64.b64decode(e["delta"]) for e in events if e["type"] == "response.audio.delta"]
    assert sum(map(len, audio)) == pytest.approx(1.6 * 8000, abs=400)
    assert events[-1]["response"]["output"][0]["content"][0]["type"] == "audio"


def test_an_unknown_model(server):
    with connect(f"{server.websocket_url}/v1/realtime?model=nothing") as socket:
        error = json.loads(socket.recv(timeout=10))["error"]
        assert error["code"] == "model_not_found" and "nothing" in error["message"]
