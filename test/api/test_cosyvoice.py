"""The routes of CosyVoice's own server, with requests like its client's."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import httpx
import pytest
from support.server_process import PROMPT_TEXT, PROMPT_WAV, Server, speak
from support.sound_files import seconds

TEXT = "Hello there, how are you today?"
EXACT = {"min_new_tokens": "25", "max_new_tokens": "25", "seed": "5"}
RECORDING = {"prompt_wav": ("prompt.wav", PROMPT_WAV.read_bytes())}


@pytest.fixture(scope="module")
def http(server: Server):
    with server.client() as client:
        yield client


def ask(
    http: httpx.Client, route: str, method: str = "GET", recording: bool = False, files=None, **fields
) -> bytes:
    """-> the PCM. `recording`: with that of the module, unless `files` has another one."""
    files = RECORDING if recording else files
    answer = http.request(method, route, data={"tts_text": TEXT, **EXACT, **fields}, files=files)
    assert answer.status_code == 200, answer.text
    return answer.content


def test_stored_voice(http):
    pcm = ask(http, "/inference_sft", spk_id="tiny_spk")
    assert len(pcm) == 48_000
    assert pcm == ask(http, "/inference_sft", "POST", spk_id="tiny_spk")
    assert pcm == speak(http, TEXT, spk_id="tiny_spk", **EXACT).content


def test_recording_without_its_way_of_speaking(http):
    pcm = ask(http, "/inference_cross_lingual", recording=True)
    assert pcm == speak(http, TEXT, prompt_text="", **EXACT).content
    assert pcm != speak(http, TEXT, prompt_text=PROMPT_TEXT, **EXACT).content


@pytest.mark.parametrize("route", ["/inference_instruct", "/inference_instruct2"])
@pytest.mark.parametrize("recording", [True, False])
def test_instruction(http, route, recording):
    """It reaches the model as an instruction, with or without the end mark, and not as a transcript."""
    voice = {} if recording else {"spk_id": "tiny_spk"}
    pcm = ask(http, route, recording=recording, instruct_text="Speak softly.", **voice)
    assert pcm == ask(http, route, recording=recording, instruct_text="Speak softly.<|endofprompt|>", **voice)
    native = speak(http, TEXT, prompt_text="Speak softly.<|endofprompt|>", **voice, **EXACT)
    assert pcm == native.content
    assert pcm != ask(http, route, recording=recording, instruct_text="Shout.", **voice)


def first_seconds(recording: Path, count: int) -> bytes:
    """The beginning of a WAV file, as a WAV file."""
    start = io.BytesIO()
    with wave.open(str(recording)) as whole, wave.open(start, "wb") as cut:
        cut.setparams(whole.getparams())
        cut.writeframes(whole.readframes(count * whole.getframerate()))
    return start.getvalue()


def test_stored_recordings_take_instructions(http):
    """Two seconds are two whole chunks, which --align_prompt leaves as they are."""
    recording = {"prompt_wav": ("prompt.wav", first_seconds(PROMPT_WAV, 2))}
    form = {"spk_id": "instructed", "prompt_text": PROMPT_TEXT}
    http.post("/add_spk", data=form, files=recording).raise_for_status()
    instruction = {"instruct_text": "Speak softly."}
    stored = ask(http, "/inference_instruct2", spk_id="instructed", **instruction)
    assert stored == ask(http, "/inference_instruct2", files=recording, **instruction)
    http.delete("/spk/instructed")


@pytest.mark.parametrize(
    ("route", "fields", "status", "reason"),
    [
        ("/inference_sft", {}, 422, "spk_id"),
        ("/inference_sft", {"spk_id": "nobody"}, 400, "nobody"),
        ("/inference_cross_lingual", {}, 422, "prompt_wav"),
        ("/inference_instruct", {"spk_id": "tiny_spk"}, 422, "instruct_text"),
        ("/inference_instruct2", {"instruct_text": "Softly."}, 422, "no voice"),
        ("/inference_instruct", {"spk_id": "tiny_spk", "instruct_text": "<|endofprompt|>"}, 400, "is empty"),
        (
            "/inference_instruct",
            {"spk_id": "tiny_spk", "instruct_text": "a<|endofprompt|>b"},
            400,
            "before its end",
        ),
    ],
)
def test_what_is_wrong_is_said(http, route, fields, status, reason):
    refused = http.post(route, data={"tts_text": TEXT, **fields})
    assert refused.status_code == status and reason in refused.json()["message"]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_other_formats_of_the_native_routes(http, stream):
    opus = ask(http, "/inference_sft", spk_id="tiny_spk", format="opus", stream=stream)
    assert seconds(opus) == pytest.approx(1.0, abs=0.05)
    wav = speak(http, TEXT, spk_id="tiny_spk", format="wav", sample_rate=8000, stream=stream, **EXACT)
    assert wav.headers["x-sample-rate"] == "8000" and seconds(wav.content) == pytest.approx(1.0, abs=0.01)
    refused = speak(http, TEXT, spk_id="tiny_spk", format="wav", sample_rate=8001)
    assert refused.status_code == 400 and "8001" in refused.json()["message"]
