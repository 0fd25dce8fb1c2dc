"""The voice that comes with Light-TTS, served as it is found when nothing is said about the model."""

from __future__ import annotations

import io
import os
import signal
import threading
import time

import numpy as np
import pytest
import soundfile
from support.server_process import VOICE, Server
from support.streams import stage_pid

from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.frontend.frontend import Frontend

TEXT = "The boat was on its way to the sea."


@pytest.fixture
def server(voice_server):
    return voice_server


def test_its_speakers_are_there_at_once_and_stay(server):
    with server.client() as client:
        listed = client.get("/spk_list").json()
        assert listed["checkpoint_speakers"] == listed["spk_ids"] == ["anna", "henry"]
        assert client.delete("/spk/anna").status_code == 409
        assert client.get("/spk_list").json() == listed


@pytest.mark.parametrize("name", ["anna", "henry"])
def test_a_name_is_all_that_a_request_needs(server, name):
    with server.client() as client:
        answer = client.post(
            "/inference_zero_shot", data={"tts_text": TEXT, "spk_id": name, "format": "wav", "seed": 3}
        )
    assert answer.status_code == 200, answer.text
    spoken, rate = soundfile.read(io.BytesIO(answer.content), dtype="float32")
    assert rate == 24_000
    assert 1.2 < len(spoken) / rate < 5
    assert 0.01 < np.sqrt(np.mean(spoken**2)) < 0.5


# With this seed it asks twice.
TWICE = {"tts_text": "What are you planning to do this summer?", "spk_id": "henry", "seed": 251}


def ask(server: Server, **fields: object) -> bytes:
    with server.client() as client:
        answer = client.post("/inference_zero_shot", data={**TWICE, **fields})
    assert answer.status_code == 200, answer.text
    return answer.content


def redrawn(server: Server) -> float:
    return server.metric("light_tts_redrawn_total", reason="repeated")


def test_words_that_were_repeated_are_drawn_again(server):
    before = redrawn(server)
    once = ask(server)
    assert redrawn(server) == before + 1 and "words repeated with seed 251; drawn again" in server.output
    twice = ask(server, min_new_tokens=2)  # whoever says how long it is to be gets what was drawn
    assert redrawn(server) == before + 1
    assert len(once) < 0.7 * len(twice)
    assert len(ask(server, stream=True)) == len(twice)  # its beginning had left when the end was known
    assert redrawn(server) == before + 1


def test_an_llm_that_dies_while_it_draws_again_changes_nothing(server):
    undisturbed, before = ask(server), server.output.count("drawn again")
    got: list[bytes] = []
    client = threading.Thread(target=lambda: got.append(ask(server)))
    pid = stage_pid(server, "llm")
    client.start()
    while server.output.count("drawn again") == before:
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    client.join()
    assert got == [undisturbed]
    server.wait_until_ready()


@pytest.mark.parametrize("name", ["anna", "henry"])
def test_what_is_stored_of_a_speaker_belongs_to_its_recording(name):
    frontend = Frontend(VOICE, load_config(VOICE))
    recording = VOICE / "voices" / f"{name}.wav"
    expected = frontend.features(*soundfile.read(recording, dtype="float32"))
    speaker = frontend.speakers[name]
    same = speaker.features.speech_token == expected.speech_token
    assert np.mean(same) > 0.95  # processors differ a little
    np.testing.assert_allclose(speaker.features.mel, expected.mel, atol=0.01)
    np.testing.assert_allclose(speaker.features.embedding, expected.embedding, atol=0.05)
    text = recording.with_suffix(".txt").read_text("utf-8").strip()
    assert speaker.prompt_text_ids == frontend.prompt_text(text).ids


def test_it_is_small_enough_to_come_with_the_code():
    assert sum(file.stat().st_size for file in VOICE.rglob("*") if file.is_file()) < 45e6
