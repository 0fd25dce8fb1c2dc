"""Word times, with the bundled voice, whose checkpoint supports them."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from support.sound_files import decode
from websockets.exceptions import ConnectionClosedOK
from websockets.sync.client import connect

from light_tts.models.llm.alignment import spans
from light_tts.server.httpserver import audio_out
from light_tts.server.httpserver.captions import Word, as_written, srt, vtt

TEXT = "Good morning! The 12 ships came back."
WORDS = ["Good", "morning!", "The", "12", "ships", "came", "back."]


@pytest.fixture(scope="module")
def http(voice_server):
    with voice_server.client() as client:
        yield client


def conversation(http: httpx.Client, path: str, *messages: dict) -> Iterator[dict | bytes]:
    """Yield the server's messages until it closes the connection."""
    address = str(http.base_url.join(path)).replace("http", "ws", 1)
    with connect(address, max_size=None) as socket:
        for message in messages:
            socket.send(json.dumps(message))
        try:
            while True:
                received = socket.recv(timeout=120)
                yield received if isinstance(received, bytes) else json.loads(received)
        except ConnectionClosedOK:
            return


def wav(pcm: bytes) -> bytes:
    return audio_out.header("wav", 24_000, len(pcm)) + pcm


def ask(http: httpx.Client, path: str = "/v1/audio/speech", **fields) -> httpx.Response:
    body = {"input": TEXT, "voice": "anna", "response_format": "wav", "seed": 1, **fields}
    return http.post(path, json=body)


def check(words: list[tuple[str, float, float]], audio: bytes) -> None:
    samples, rate = decode(audio)
    assert [word for word, _, _ in words] == WORDS
    assert all(0.05 <= end - start <= 1.0 for _, start, end in words)
    assert all(before[2] <= word[1] + 0.001 for before, word in itertools.pairwise(words))
    loud = np.flatnonzero(np.abs(samples) > 0.02) / rate
    assert words[0][1] == pytest.approx(loud[0], abs=0.1) and words[-1][2] == pytest.approx(loud[-1], abs=0.1)


def test_audio_with_captions(http):
    answer = ask(http, "/dev/captioned_speech", subtitles="srt").json()
    words = [(entry["word"], entry["start_time"], entry["end_time"]) for entry in answer["timestamps"]]
    check(words, base64.b64decode(answer["audio"]))
    assert answer["audio_format"] == "audio/wav"
    first, second = answer["subtitles"].strip().split("\n\n")
    assert first.endswith("Good morning!") and second.endswith("The 12 ships came back.")
    fast = ask(http, "/dev/captioned_speech", speed=2).json()["timestamps"]
    assert fast[-1]["end_time"] == pytest.approx(words[-1][2] / 2, abs=0.01)


def test_events_and_header(http):
    events = [
        json.loads(line.removeprefix("data: "))
        for line in ask(http, stream_format="sse", word_timestamps=True).text.split("\n")
        if line
    ]
    assert [event["type"] for event in events[-2:]] == ["speech.audio.words", "speech.audio.done"]
    audio = b"".join(base64.b64decode(event["audio"]) for event in events[:-2])
    check([(w["word"], w["start_ms"] / 1000, w["end_ms"] / 1000) for w in events[-2]["words"]], audio)
    whole = ask(http, stream=False, word_timestamps=True)
    words = json.loads(whole.headers["x-word-timestamps"])
    check([(w["word"], w["start_ms"] / 1000, w["end_ms"] / 1000) for w in words], whole.content)


def test_characters_as_elevenlabs_has_them(http):
    path = "/v1/text-to-speech/anna/with-timestamps?output_format=wav_24000"
    answer = http.post(path, json={"text": TEXT, "seed": 1}).json()
    times = answer["alignment"]
    assert "".join(times["characters"]) == TEXT
    starts, ends = times["character_start_times_seconds"], times["character_end_times_seconds"]
    assert starts == sorted(starts) and ends == sorted(ends)
    assert len(starts) == len(ends) == len(TEXT) and starts[1:] == ends[:-1]
    samples, rate = decode(base64.b64decode(answer["audio_base64"]))
    assert ends[-1] <= len(samples) / rate


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({}, "stream_format sse"), ({"stream": False, "max_pause": 0.2}, "max_pause")],
)
def test_where_times_cannot_be_said(http, fields, reason):
    refused = ask(http, word_timestamps=True, **fields)
    assert refused.status_code == 400 and reason in refused.json()["error"]["message"]


def test_instructions_are_not_read_aloud(http):
    """This voice does not support instructions."""
    refused = ask(http, instructions="Be happy.")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "instructions"
    native = {"tts_text": TEXT, "spk_id": "anna", "prompt_text": "Be happy.<|endofprompt|>"}
    assert http.post("/inference_zero_shot", data=native).status_code == 400


def test_words_while_their_text_comes(http):
    pieces = [{"tts_text": f"{word} "} for word in TEXT.split()]
    opening = {"spk_id": "anna", "seed": 1, "word_timestamps": True}
    answers = list(conversation(http, "/inference_bistream", opening, *pieces, {"finish": True}))
    pcm = b"".join(answer for answer in answers if isinstance(answer, bytes))
    words = [word for answer in answers if isinstance(answer, dict) for word in answer["words"]]
    check([(w["word"], w["start_ms"] / 1000, w["end_ms"] / 1000) for w in words], wav(pcm))
    first = next(index for index, answer in enumerate(answers) if isinstance(answer, dict))
    assert any(isinstance(answer, bytes) for answer in answers[first:])  # not all at the end


def test_words_as_vllm_omni_has_them(http):
    config = {"type": "session.config", "voice": "anna", "seed": 1, "word_timestamps": True}
    answers = list(
        conversation(
            http,
            "/v1/audio/speech/stream",
            {**config, "response_format": "pcm", "stream_audio": True},
            config,  # refused: there is no place for times beside files
            {"type": "input.text", "text": TEXT},
            {"type": "session.close"},
        )
    )
    assert "stream_audio" in answers[0]["message"] and answers[1]["word_timestamps"] is True
    chunks = [answer for answer in answers if answer["type"] == "audio.chunk"]
    assert [chunk["chunk_id"] for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk["timestamps"] is None for chunk in chunks[:-1]) and not chunks[-1]["audio_b64"]
    pcm = b"".join(base64.b64decode(chunk["audio_b64"]) for chunk in chunks)
    assert chunks[-1]["chunk_end_ms"] == round(len(pcm) / 48) == chunks[-2]["chunk_end_ms"]
    check([(w["word"], w["start_ms"] / 1000, w["end_ms"] / 1000) for w in chunks[-1]["timestamps"]], wav(pcm))


def test_the_alignment_of_a_conversation_as_elevenlabs_has_it(http):
    pieces = [{"text": f"{word} "} for word in TEXT.split()]
    path = "/v1/text-to-speech/anna/stream-input?output_format=pcm_24000&seed=1"
    answers = list(conversation(http, path, {"text": " "}, *pieces, {"text": ""}))
    pcm = b"".join(base64.b64decode(answer["audio"]) for answer in answers if answer["audio"])
    characters, starts, ends, clock = "", [], [], 0
    for times in (answer["alignment"] for answer in answers if answer.get("alignment")):
        characters += "".join(times["chars"])
        begins = times["charStartTimesMs"]
        starts += [clock + begin for begin in begins]
        ends += [clock + a + b for a, b in zip(begins, times["charDurationsMs"], strict=True)]
        clock = ends[-1]
    assert characters == TEXT and len(starts) == len(TEXT)
    borders = [0, *(i + 1 for i, character in enumerate(TEXT) if character == " "), len(TEXT) + 1]
    words = [(starts[a] / 1000, ends[b - 2] / 1000) for a, b in itertools.pairwise(borders)]
    check([(word, *times) for word, times in zip(WORDS, words, strict=True)], wav(pcm))


# -- without a server


def test_the_way_through_the_words_never_goes_back():
    attention = np.full((8, 3), 0.01)
    attention[[0, 1, 2], 0] = attention[[3, 4, 5], 1] = attention[[6, 7], 2] = 0.9
    assert spans(np.log(attention)) == [0, 3, 3, 6, 6, 8]
    attention[4] = 0.01, 0.2, 0.8  # a glance ahead
    attention[7] = 0.8, 0.01, 0.2  # and back
    assert spans(np.log(attention)) == [0, 3, 3, 6, 6, 8]


def test_words_that_were_left_out_have_one_token():
    attention = np.full((6, 3), 1e-4)
    attention[:3, 0] = attention[3:, 2] = 0.99
    first, second, third = np.reshape(spans(np.log(attention)), (3, 2)).tolist()
    assert first[1] == second[0] and second[1] == third[0] == second[0] + 1 and third[1] == 6
    assert spans(np.log(np.full((1, 1), 0.5))) == [0, 1]
    assert spans(np.log(np.full((1, 3), 0.5))) == [0, 1, 1, 1, 1, 1]  # more words than tokens


def test_words_of_a_speech_that_goes_on():
    """Only those that have been left behind."""
    attention = np.full((6, 3), 0.01)
    attention[:3, 0] = attention[3:, 1] = 0.9
    assert spans(np.log(attention), ended=False) == [0, 3]
    assert spans(np.log(attention[:2]), ended=False) == []
    spoken = [Word(word, i, i + 1) for i, word in enumerate(("the", "twelve", "ships"))]
    heard = [as_written("The 12 ships came.", spoken[:count], complete=False) for count in range(4)]
    assert [len(words) for words in heard] == [0, 1, 1, 3] and heard[3][1] == Word("12", 1, 2)


def test_words_as_they_were_written():
    heard = "on may fifth twenty twenty it cost ten dollars"
    spoken = [Word(word, i, i + 1) for i, word in enumerate(heard.split())]
    words = as_written('On "May 5, 2020" - it cost $10.', spoken)
    assert words[0] == Word("On", 0, 1) and words[-1] == Word("$10.", 7, 9)
    assert " ".join(word.text for word in words) == 'On "May 5, 2020" - it cost $10.'
    chinese = [Word("今", 0, 1), Word("天", 1, 2), Word("好。", 2, 3)]
    assert [word.text for word in as_written("今天好。", chinese)] == ["今", "天", "好。"]
    assert as_written("", []) == [] and srt([]) == ""


def test_subtitles():
    words = [Word("One", 0.5, 0.8), Word("two.", 0.8, 1.25), Word("Three", 3661.0, 3661.5)]
    assert srt(words) == (
        "1\n00:00:00,500 --> 00:00:01,250\nOne two.\n\n2\n01:01:01,000 --> 01:01:01,500\nThree\n"
    )
    assert vtt(words).startswith("WEBVTT\n\n00:00:00.500 --> 00:00:01.250\nOne two.\n")
    long = [Word("word", i, i + 0.5) for i in range(20)]
    assert all(len(line) <= 42 for line in srt(long).splitlines())
