"""The voice that comes with Light-TTS, served as it is found when nothing is said about the model."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from support.server_process import VOICE, launch

from light_tts.models.checkpoint.config import load_config
from light_tts.models.frontend.frontend import Frontend

TEXT = "The boat was on its way to the sea."


@pytest.fixture(scope="module")
def server():
    with launch(model_dir=None) as running:
        yield running


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
