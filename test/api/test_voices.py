"""Named voices: visible to all workers, persistent across restarts, and confined to their directory."""

from __future__ import annotations

import base64
import contextlib
import io
from pathlib import Path

import httpx
import pytest
import soundfile
from support.server_process import PROMPT_TEXT, PROMPT_WAV, Server, speak, start_server

from light_tts.common.whole_chunks import in_whole_chunks
from light_tts.server.httpserver.prompts import prompt_from_samples

TEXT = "Hello there."


def add(client: httpx.Client, spk_id: str, prompt_text: str = PROMPT_TEXT, recording: bytes | None = None):
    files = {"prompt_wav": ("a.wav", PROMPT_WAV.read_bytes() if recording is None else recording)}
    return client.post("/add_spk", data={"spk_id": spk_id, "prompt_text": prompt_text}, files=files)


@pytest.fixture()
def client(server: Server):
    with server.client() as http:
        yield http


@contextlib.contextmanager
def fresh(server: Server):
    """A new connection, which may reach another worker."""
    with server.client() as http:
        yield http


def whole_chunks() -> bytes:
    """The recording as a voice that is made of it speaks with it."""
    samples, rate = soundfile.read(PROMPT_WAV, dtype="float32")
    file = io.BytesIO()
    soundfile.write(file, in_whole_chunks(samples, rate, 1.0), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def by_upload(client: httpx.Client, recording: bytes) -> bytes:
    data = {
        "tts_text": TEXT,
        "prompt_text": PROMPT_TEXT,
        "max_new_tokens": 40,
        "min_new_tokens": 1,
        "seed": 2,
    }
    answer = client.post("/inference_zero_shot", data=data, files={"prompt_wav": recording})
    assert answer.status_code == 200
    return answer.content


def test_a_voice_speaks_like_the_recording_it_was_made_from_in_whole_chunks(server, client):
    assert add(client, "anna").status_code == 200
    by_recording = by_upload(client, whole_chunks())
    assert by_recording != by_upload(client, PROMPT_WAV.read_bytes())
    for _ in range(6):
        with fresh(server) as other:
            assert "anna" in other.get("/spk_list").json()["voices"]
            assert speak(other, TEXT, seed=2, spk_id="anna").content == by_recording
    client.delete("/spk/anna")


def test_a_voice_can_be_added_by_json(client):
    body = {"spk_id": "Анна-2", "prompt_text": PROMPT_TEXT}
    body["prompt_wav"] = base64.b64encode(PROMPT_WAV.read_bytes()).decode()
    assert client.post("/add_spk", json=body).json() == {"message": "Ok", "spk_id": "Анна-2"}
    assert "Анна-2" in client.get("/spk_list").json()["spk_ids"]
    assert speak(client, TEXT, spk_id="Анна-2").status_code == 200
    assert client.delete("/spk/Анна-2").status_code == 200


def test_a_voice_stored_again_is_another_for_every_worker(server, client):
    add(client, "same")
    before = speak(client, TEXT, seed=2, spk_id="same").content
    samples, rate = soundfile.read(PROMPT_WAV, dtype="float32")
    file = io.BytesIO()
    soundfile.write(file, samples[::-1], rate, format="WAV")
    for recording in (file.getvalue(), PROMPT_WAV.read_bytes()):
        add(client, "same", recording=recording)
        for _ in range(4):
            with fresh(server) as other:
                again = speak(other, TEXT, seed=2, spk_id="same").content
                assert (again == before) == (recording == PROMPT_WAV.read_bytes())
    client.delete("/spk/same")


def test_a_recording_is_sent_again_where_its_features_have_gone(server, client):
    samples, rate = soundfile.read(PROMPT_WAV, dtype="float32")
    key = prompt_from_samples(samples * 0.5, rate, PROMPT_TEXT).key
    (sockets,) = (server.directory / "ipc").glob("light_tts-*")
    shared = Path("/dev/shm") / sockets.name
    (shared / f"prompt-0-{key}.prompt").touch()  # as if encode had them
    file = io.BytesIO()
    soundfile.write(file, samples * 0.5, rate, format="WAV", subtype="FLOAT")
    recoveries = server.metric("light_tts_request_recoveries_total")
    by_upload(client, file.getvalue())
    assert server.metric("light_tts_request_recoveries_total") == recoveries + 1


def test_a_deleted_voice_is_gone_for_every_worker(server, client):
    add(client, "gone")
    assert client.delete("/spk/gone").json() == {"message": "Ok"}
    for _ in range(6):
        with fresh(server) as other:
            answer = speak(other, TEXT, spk_id="gone")
            assert answer.status_code == 400
            assert "unknown spk_id 'gone'" in answer.json()["message"]
    assert client.delete("/spk/gone").status_code == 404


def test_speakers_of_the_checkpoint_are_listed_and_cannot_be_changed(client):
    listed = client.get("/spk_list").json()
    assert listed["checkpoint_speakers"] == ["tiny_spk"]
    assert "tiny_spk" in listed["spk_ids"]
    assert speak(client, TEXT, spk_id="tiny_spk").status_code == 200
    assert add(client, "tiny_spk").status_code == 409
    assert client.delete("/spk/tiny_spk").status_code == 409


@pytest.mark.parametrize(
    ("field", "reason"),
    [("speaker", "unknown field; known are spk_id"), ("seed", "is not stored with a voice")],
)
def test_a_field_that_no_voice_has_is_refused_by_name(client, field, reason):
    body = {"spk_id": "odd", "prompt_text": PROMPT_TEXT, field: 1}
    body["prompt_wav"] = base64.b64encode(PROMPT_WAV.read_bytes()).decode()
    answer = client.post("/add_spk", json=body)
    assert answer.status_code == 422
    assert f"{field}: {reason}" in answer.json()["message"]
    assert "odd" not in client.get("/spk_list").json()["spk_ids"]


@pytest.mark.parametrize(
    "spk_id", ["", "../evil", "..", ".hidden", "a/b", "a\\b", "a b", "x" * 49, "a\0b", "/etc/passwd", "-x"]
)
def test_a_name_that_is_no_safe_file_name_is_refused(server, client, spk_id):
    assert add(client, spk_id).status_code in (400, 422)
    voices = server.directory / "voices"
    outside = [path for path in server.directory.rglob("*evil*") if voices not in path.parents]
    assert outside == []


def test_a_recording_that_cannot_be_used_makes_no_voice(client):
    answer = add(client, "broken", recording=b"no sound")
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("audio file format is incorrect: ")
    assert answer.json()["message"].endswith("this is text")
    assert "broken" not in client.get("/spk_list").json()["spk_ids"]


def test_a_server_that_starts_later_has_the_voices_in_the_directory(server, client):
    assert add(client, "kept").status_code == 200
    before = speak(client, TEXT, seed=2, spk_id="kept").content
    with start_server(spk_dir=server.directory / "voices") as later, later.client() as other:
        assert "kept" in other.get("/spk_list").json()["voices"]
        assert speak(other, TEXT, seed=2, spk_id="kept").content == before
    assert client.delete("/spk/kept").status_code == 200
