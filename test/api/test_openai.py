"""OpenAI's unmodified client against a real server."""

from __future__ import annotations

import base64
import io
import json
import wave

import httpx
import openai
import pytest
from support.server_process import PROMPT_TEXT, PROMPT_WAV, Server
from support.sound_files import decode, seconds

from light_tts.server.httpserver.sound import FORMATS

TEXT = "Hello there, how are you today?"
EXACT = {"min_new_tokens": 40, "max_new_tokens": 40, "seed": 3}  # 1.6 s
SECONDS = 1.6
OPENAI_VOICES = {  # all that its client knows
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage"),
    *("shimmer", "verse"),
}


@pytest.fixture(scope="module")
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


def speak(client: openai.OpenAI, text: str = TEXT, **fields):
    known = {"model": "tts-1", "voice": "alloy", "input": text}
    for name in ("model", "voice", "response_format", "speed", "instructions", "stream_format"):
        if name in fields:
            known[name] = fields.pop(name)
    return client.audio.speech.create(**known, extra_body={**EXACT, **fields})


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(client, format):
    answer = speak(client, response_format=format)
    audio = answer.read()
    assert "content-length" not in answer.response.headers  # streamed
    length = len(audio) / 48_000 if format == "pcm" else seconds(audio)
    assert SECONDS - 0.01 <= length <= SECONDS + 0.1
    kinds = {"mp3": "audio/mpeg", "opus": "audio/ogg"}
    assert answer.response.headers["content-type"] == kinds.get(format, f"audio/{format}")
    assert answer.response.headers["x-sample-rate"] == "24000"


def test_streamed_to_a_file(client, tmp_path):
    with client.audio.speech.with_streaming_response.create(
        model="gpt-4o-mini-tts", voice="nova", input=TEXT, extra_body=EXACT
    ) as answer:
        answer.stream_to_file(tmp_path / "speech.mp3")
    assert SECONDS <= seconds((tmp_path / "speech.mp3").read_bytes()) <= SECONDS + 0.1


def test_in_one_piece_with_its_length(client):
    answer = speak(client, response_format="wav", stream=False)
    audio = answer.read()
    assert int(answer.response.headers["content-length"]) == len(audio)
    with wave.open(io.BytesIO(audio)) as file:
        assert file.getnframes() == SECONDS * 24_000


def test_the_same_seed_gives_the_same_audio(client):
    first, again = (speak(client, response_format="pcm").read() for _ in range(2))
    assert first == again != speak(client, response_format="pcm", seed=4).read()


@pytest.mark.parametrize("speed", [0.25, 4.0])
def test_speed_while_streaming(client, speed):
    audio = speak(client, response_format="wav", speed=speed).read()
    assert seconds(audio) == pytest.approx(SECONDS / speed, rel=0.03, abs=0.06)


def test_sample_rate(client):
    audio = speak(client, response_format="flac", sample_rate=16000).read()
    samples, rate = decode(audio)
    assert rate == 16000 and len(samples) == pytest.approx(SECONDS * 16000, abs=20)


@pytest.mark.parametrize("options", [{"stream_format": "sse"}, {"stream": True}])
def test_events(client, options):
    answer = speak(client, response_format="mp3", **options)
    assert answer.response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    *deltas, done = (json.loads(line.removeprefix("data: ")) for line in lines)
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    audio = b"".join(base64.b64decode(event["audio"]) for event in deltas)
    assert SECONDS <= seconds(audio) <= SECONDS + 0.1
    usage = done["usage"]
    assert done["type"] == "speech.audio.done" and usage["output_tokens"] == 40
    assert 5 < usage["input_tokens"] < 30
    assert usage["total_tokens"] == usage["input_tokens"] + 40


def test_voices_of_openai_and_forms_of_a_name(client, server):
    by_name = speak(client, voice="tiny_spk", response_format="pcm").read()
    assert speak(client, voice={"id": "tiny_spk"}, response_format="pcm").read() == by_name
    assert speak(client, voice="shimmer", response_format="pcm").read() == by_name
    listed = httpx.get(f"{server.url}/v1/audio/voices").json()["voices"]
    assert OPENAI_VOICES | {"tiny_spk"} == {voice["id"] for voice in listed}
    assert all(voice["name"] for voice in listed)


def test_a_recording_comes_with_the_request(client):
    recording = base64.b64encode(PROMPT_WAV.read_bytes()).decode()
    plain = speak(client, ref_audio=recording, ref_text=PROMPT_TEXT, response_format="pcm").read()
    url = f"data:audio/wav;base64,{recording}"
    assert speak(client, ref_audio=[url], ref_text=PROMPT_TEXT, response_format="pcm").read() == plain
    assert plain != speak(client, response_format="pcm").read()


def test_instructions_change_how_it_is_spoken(client):
    plain, happy = (
        speak(client, response_format="pcm", **more).read() for more in ({}, {"instructions": "Be happy."})
    )
    assert plain != happy
    with pytest.raises(openai.BadRequestError, match="instructions is empty"):
        speak(client, instructions=" <|endofprompt|>")


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"voice": "nobody"}, openai.BadRequestError, "voice"),
        ({"text": ""}, openai.BadRequestError, "input"),
        ({"text": "?!"}, openai.BadRequestError, "input"),
        ({"text": "a" * 5001}, openai.BadRequestError, "input"),
        ({"speed": 4.1}, openai.BadRequestError, "speed"),
        ({"response_format": "ogg"}, openai.BadRequestError, "response_format"),
        ({"response_format": "opus", "sample_rate": 44100}, openai.BadRequestError, "sample_rate"),
        ({"ref_audio": "https://example.com/a.wav"}, openai.BadRequestError, "ref_audio"),
        ({"ref_audio": "/etc/passwd"}, openai.BadRequestError, "ref_audio"),
        ({"ref_text": "What?"}, openai.BadRequestError, "ref_audio"),
        ({"seed": -1}, openai.BadRequestError, "seed"),
    ],
)
def test_errors_are_those_of_the_client(client, fields, kind, field):
    with pytest.raises(kind) as refused:
        speak(client, **fields)
    body = refused.value.body
    assert body["message"] and body["type"] == "invalid_request_error"
    assert body["param"] == field and refused.value.request_id


def test_fields_of_other_servers_are_named_and_let_pass(client):
    answer = speak(client, lang_code="a", **{"bad\r\nname": 1})
    assert answer.response.headers["x-ignored-fields"] == "lang_code"


def test_models(client):
    names = [model.id for model in client.models.list()]
    assert {"tts-1", "tts-1-hd", "gpt-4o-mini-tts"} <= set(names)
    assert all(client.models.retrieve(name).id == name for name in names)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_voice_from_upload_to_deletion(client, server: Server):
    voices = f"{server.url}/v1/audio/voices"
    form = {"name": "maria", "consent": "c-1", "ref_text": PROMPT_TEXT, "speaker_description": "warm"}
    stored = httpx.post(voices, data=form, files={"audio_sample": ("m.wav", PROMPT_WAV.read_bytes())})
    assert stored.status_code == 200 and stored.json()["voice"]["name"] == "maria"
    listed = httpx.get(voices).json()
    assert listed["uploaded_voices"] == [{"name": "maria"}]
    assert {"id": "maria", "name": "maria"} in listed["voices"]
    assert "maria" in httpx.get(f"{server.url}/spk_list").json()["spk_ids"]
    assert speak(client, voice="maria").read()
    assert httpx.delete(f"{voices}/maria").status_code == 200
    gone = httpx.delete(f"{voices}/maria")
    assert gone.status_code == 404 and gone.json()["error"]["message"]
    kept = httpx.delete(f"{voices}/tiny_spk")
    assert kept.status_code == 409
    missing = httpx.post(voices, data={"name": "maria"})
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "audio_sample"


def test_times_of_words_from_a_checkpoint_that_does_not_know_them(server):
    body = {"input": TEXT, "voice": "tiny_spk", "seed": 1, "stream": False, "word_timestamps": True}
    with server.client() as http:
        refused = http.post("/v1/audio/speech", json=body)
        untimed = http.post("/v1/text-to-speech/tiny_spk/with-timestamps", json={"text": TEXT, "seed": 1})
    assert refused.status_code == 400 and "alignment_heads" in refused.json()["error"]["message"]
    assert untimed.json()["alignment"] is None and untimed.json()["audio_base64"]
