"""WebSockets with incremental text, with the messages of vLLM-Omni and of ElevenLabs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from support.server_process import PROMPT_TEXT, PROMPT_WAV, Server
from support.sound_files import seconds
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

EXACT = {"min_new_tokens": 40, "max_new_tokens": 40, "seed": 3}  # 1.6 s, on a WebSocket a little less
CONFIG = {"type": "session.config", "voice": "tiny_spk", "response_format": "pcm", "stream_audio": True}


def say(socket: ClientConnection, **message) -> None:
    socket.send(json.dumps(message))


def utterance(socket: ClientConnection) -> tuple[list[dict], bytes]:
    """Return the messages up to session.done, and the audio among them."""
    messages, audio = [], b""
    while not messages or messages[-1]["type"] != "session.done":
        received = socket.recv(timeout=60)
        if isinstance(received, bytes):
            audio += received
        else:
            messages.append(json.loads(received))
    return messages, audio


# -- vLLM-Omni


@pytest.fixture
def omni(server: Server) -> Iterator[ClientConnection]:
    with connect(f"{server.websocket_url}/v1/audio/speech/stream", max_size=None) as socket:
        yield socket


def test_several_utterances_on_one_connection(omni):
    say(omni, **CONFIG, **EXACT)
    for index in (0, 1):
        for piece in ("Hello ", "there, how ", "are you?"):
            say(omni, type="input.text", text=piece)
        say(omni, type="input.done")
        messages, audio = utterance(omni)
        assert [message["type"] for message in messages] == ["audio.start", "audio.done", "session.done"]
        assert {message["utterance_index"] for message in messages} == {index}
        assert messages[0]["format"] == "pcm" and messages[0]["sample_rate"] == 24_000
        assert messages[1]["total_bytes"] == len(audio) > 1.3 * 48_000
    say(omni, type="session.close")
    with pytest.raises(ConnectionClosed) as closed:
        omni.recv(timeout=10)
    assert closed.value.rcvd.code == 1000


def test_audio_begins_before_the_text_has_ended(omni):
    say(omni, **CONFIG, **{**EXACT, "min_new_tokens": 400, "max_new_tokens": 400})
    say(omni, type="input.text", text="One two three four five six seven eight nine ten " * 4)
    assert json.loads(omni.recv(timeout=60))["type"] == "audio.start"
    assert len(omni.recv(timeout=60)) > 0
    say(omni, type="input.done")
    utterance(omni)


def test_a_file_for_each_utterance(omni):
    say(omni, **{**CONFIG, **EXACT, "response_format": "wav", "stream_audio": False, "speed": 2.0})
    say(omni, type="input.text", text="Hello there.")
    say(omni, type="input.done")
    _, audio = utterance(omni)
    assert seconds(audio) == pytest.approx(0.8, abs=0.1)


def test_the_voice_of_a_recording_and_another_one_later(omni):
    recording = base64.b64encode(PROMPT_WAV.read_bytes()).decode()
    audio = []
    for voice in ({"ref_audio": recording, "ref_text": PROMPT_TEXT}, {"voice": "tiny_spk"}):
        say(omni, **{**CONFIG, **EXACT, "voice": None, **voice})
        say(omni, type="input.text", text="Hello there.")
        say(omni, type="input.done")
        audio.append(utterance(omni)[1])
    assert audio[0] and audio[1] and audio[0] != audio[1]


def test_wrong_messages_are_explained_and_the_session_goes_on(omni):
    say(omni, **CONFIG, **EXACT)
    for wrong in (
        {"type": "input.text"},
        {"type": "dance"},
        {"type": "session.config", "voice": "nobody"},
        {"type": "session.config", "speed": 9},
        {"type": "input.text", "text": "a" * 5001},
    ):
        say(omni, **wrong)
        answer = json.loads(omni.recv(timeout=10))
        assert answer["type"] == "error" and answer["message"]
    say(omni, type="input.done")
    messages, audio = utterance(omni)
    assert messages[-1]["total_sentences"] == 0 and not audio
    say(omni, type="input.text", text="?!")
    say(omni, type="input.done")
    messages, audio = utterance(omni)
    assert messages[0]["type"] == "error" and not audio
    say(omni, type="input.text", text="Hello.")
    say(omni, type="input.done")
    assert utterance(omni)[1]


def test_the_first_message_is_the_config(omni):
    say(omni, type="input.text", text="Hello.")
    assert "session.config" in json.loads(omni.recv(timeout=10))["message"]
    with pytest.raises(ConnectionClosed):
        omni.recv(timeout=10)


def test_pauses_are_shortened_on_the_native_websocket(server):
    """At its beginning this speech has no pause: what is said is the same, and fades."""
    audio = []
    for wish in ({}, {"max_pause": 0.05}):
        with connect(f"{server.websocket_url}/inference_bistream", max_size=None) as socket:
            say(socket, spk_id="tiny_spk", **EXACT, **wish)
            say(socket, tts_text="Hello there.", finish=True)
            pieces = []
            with pytest.raises(ConnectionClosed):
                while True:
                    pieces.append(np.frombuffer(socket.recv(timeout=60), "<i2"))
            audio.append(np.concatenate(pieces))
    plain, shortened = audio
    assert len(shortened) <= len(plain) and abs(shortened[0]) <= abs(plain).max() / 50


# -- ElevenLabs


def eleven(server: Server, path: str, **query) -> ClientConnection:
    query = {"output_format": "pcm_24000", "model_id": "eleven_flash_v2_5", "seed": 3, **query}
    address = httpx.URL(f"{server.websocket_url}/v1/text-to-speech/{path}", params=query)
    return connect(str(address), max_size=None)


def heard(socket: ClientConnection) -> list[dict]:
    """Return all messages until the server closes the connection."""
    messages = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            messages.append(json.loads(socket.recv(timeout=60)))
    assert closed.value.rcvd.code == 1000
    return messages


def audio_of(messages: list[dict]) -> bytes:
    return b"".join(base64.b64decode(message["audio"]) for message in messages if message.get("audio"))


def test_one_conversation(server):
    with eleven(server, "tiny_spk/stream-input") as socket:
        say(socket, text=" ", voice_settings={"stability": 0.5, "speed": 1.0})
        say(socket, text="Hello there, ", try_trigger_generation=True)
        say(socket, text="how are you? ")
        say(socket, text="")
        messages = heard(socket)
    assert len(audio_of(messages)) > 10_000 and messages[-1]["isFinal"] is True
    assert all(message["isFinal"] is False for message in messages[:-1])


def test_contexts_speak_beside_each_other(server):
    with eleven(server, "tiny_spk/multi-stream-input") as socket:
        for context in ("a", "b"):
            say(socket, text=" ", voice_settings={"speed": 1.0}, context_id=context)
        say(socket, text="Hello there. ", context_id="a")
        say(socket, text="Good morning. ", context_id="b", flush=True)
        say(socket, context_id="a", flush=True)
        say(socket, text="And again. ", context_id="a")
        say(socket, text="")  # keep-alive
        for context in ("a", "b", "never opened"):
            say(socket, context_id=context, close_context=True)
        final, messages = set(), []
        while final != {"a", "b"}:
            messages.append(json.loads(socket.recv(timeout=60)))
            if messages[-1]["isFinal"]:
                final.add(messages[-1]["contextId"])
        for context in ("a", "b"):
            assert audio_of([message for message in messages if message["contextId"] == context])
        say(socket, text="Once more. ", context_id="a", flush=True)  # a new one of this name
        assert json.loads(socket.recv(timeout=60))["contextId"] == "a"
        say(socket, close_socket=True)
        assert heard(socket)[-1]["isFinal"] is True


def test_too_many_contexts_and_texts_that_cannot_be_spoken(server):
    with eleven(server, "tiny_spk/multi-stream-input") as socket:
        for context in range(6):
            say(socket, text=" ", context_id=str(context))
        refused = json.loads(socket.recv(timeout=10))
        assert "contexts are already open" in refused["message"] and refused["contextId"] == "5"
        say(socket, text="?! ", context_id="0", flush=True)
        failed = json.loads(socket.recv(timeout=60))
        assert failed["contextId"] == "0" and "the text is empty" in failed["message"]


@pytest.mark.parametrize(
    ("path", "query", "reason"),
    [
        ("nobody/stream-input", {}, "nobody"),
        ("tiny_spk/stream-input", {"output_format": "mp4_1"}, "output_format"),
        ("tiny_spk/stream-input", {"output_format": "opus_44100_64"}, "44100"),
        ("tiny_spk/multi-stream-input", {"seed": "x"}, "seed"),
    ],
)
def test_refused_conversations(server, path, query, reason):
    with eleven(server, path, **query) as socket:
        assert reason in json.loads(socket.recv(timeout=10))["detail"]["message"]
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=10)
        assert closed.value.rcvd.code == 1008


@pytest.mark.parametrize("format", ["mp3_44100_128", "opus_48000_64", "pcm_16000", "ulaw_8000"])
@pytest.mark.parametrize("route", ["", "/stream"])
def test_speech_of_one_request(server, format, route):
    body = {"text": "Hello there.", "model_id": "eleven_v3", "voice_settings": {"stability": 1}, **EXACT}
    with server.client() as client:
        path = f"/v1/text-to-speech/tiny_spk{route}"
        answer = client.post(path, params={"output_format": format}, json=body)
    assert answer.status_code == 200, answer.text
    codec, rate = format.split("_")[:2]
    assert answer.headers["x-sample-rate"] == rate
    raw = {"pcm": 2, "ulaw": 1}.get(codec)
    length = len(answer.content) / int(rate) / raw if raw else seconds(answer.content)
    assert length == pytest.approx(1.6, abs=0.1)
    if codec == "pcm":
        assert np.abs(np.frombuffer(answer.content, "<i2")).max() > 0
    assert ("content-length" in answer.headers) == (route == "")


def test_voices_and_errors_of_elevenlabs(server):
    with server.client() as client:
        voices = client.get("/v1/voices").json()["voices"]
        assert {"voice_id": "tiny_spk", "name": "tiny_spk", "category": "premade", "labels": {}} in voices
        assert client.get("/v1/voices/tiny_spk").json()["voice_id"] == "tiny_spk"
        missing = client.post("/v1/text-to-speech/nobody", json={"text": "Hello."})
        assert missing.status_code == 404 and missing.json()["detail"]["status"] == "voice_not_found"
        empty = client.post("/v1/text-to-speech/tiny_spk", json={"text": ""})
        assert empty.status_code == 400 and empty.json()["detail"]["message"]
