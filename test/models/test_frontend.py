import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from light_tts.common.audio import read_audio
from light_tts.models.checkpoint.cosyvoice2_config import load_config
from light_tts.models.checkpoint.cosyvoice3_config import load_config3
from light_tts.models.checkpoint.weights import CheckpointError
from light_tts.models.frontend.frontend import Frontend
from light_tts.models.frontend.text import (
    LONGEST_SENTENCE,
    MERGE_LENGTH,
    MIN_LENGTH,
    TextNormalizer,
    split_sentences,
)

GOLDEN = Path("test/golden/cosyvoice2")
CHECKPOINT = GOLDEN / "checkpoint"
GOLDEN3 = Path("test/golden/cosyvoice3")


@pytest.fixture(scope="module")
def frontend() -> Frontend:
    return Frontend(CHECKPOINT, load_config(CHECKPOINT))


@pytest.fixture
def broken(tmp_path) -> Path:
    """A copy of the checkpoint's small files to damage."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(
        CHECKPOINT, copy, ignore=shutil.ignore_patterns("*.safetensors", "llm.pt", "flow*", "hift*")
    )
    return copy


@pytest.mark.parametrize(
    "name",
    [
        "campplus.onnx",
        "speech_tokenizer_v2.onnx",
        "CosyVoice-BlankEN/vocab.json",
        "CosyVoice-BlankEN/merges.txt",
        "CosyVoice-BlankEN/config.json",
        "CosyVoice-BlankEN/tokenizer_config.json",
    ],
)
def test_a_missing_file_is_named(broken, name):
    (broken / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        Frontend(broken, load_config(broken))


@pytest.mark.parametrize("name", ["campplus.onnx", "speech_tokenizer_v2.onnx", "spk2info.pt"])
@pytest.mark.parametrize("kept", [0, 1000])
def test_a_truncated_file_is_named(broken, name, kept):
    path = broken / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=name):
        Frontend(broken, load_config(broken))


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json", "config.json"])
def test_a_damaged_tokenizer_file_is_an_error_of_the_checkpoint(broken, name):
    (broken / "CosyVoice-BlankEN" / name).write_text('{"broken')
    with pytest.raises(CheckpointError, match="CosyVoice-BlankEN"):
        Frontend(broken, load_config(broken))


def test_swapped_onnx_files_are_noticed(broken):
    shutil.copyfile(broken / "campplus.onnx", broken / "speech_tokenizer_v2.onnx")
    with pytest.raises(CheckpointError, match="speech_tokenizer_v2"):
        Frontend(broken, load_config(broken))


def test_no_spk2info_means_no_speakers(broken):
    (broken / "spk2info.pt").unlink()
    assert Frontend(broken, load_config(broken)).speakers == {}


def saved_prompt(tokens: int = 4, frames: int = 8) -> dict:
    """An entry of spk2info.pt as a saved zero-shot prompt."""
    return {
        "prompt_text": torch.tensor([[1, 2, 3]]),
        "llm_prompt_speech_token": torch.arange(tokens, dtype=torch.int32)[None],
        "flow_prompt_speech_token": torch.arange(tokens, dtype=torch.int32)[None],
        "prompt_speech_feat": torch.ones(1, frames, 80),
        "llm_embedding": torch.ones(1, 192),
        "flow_embedding": torch.ones(1, 192),
    }


def test_both_kinds_of_stored_voices_can_be_used(broken):
    torch.save({"new": saved_prompt(), "old": {"embedding": torch.zeros(1, 192)}}, broken / "spk2info.pt")
    frontend = Frontend(broken, load_config(broken))
    saved, plain = frontend.speakers["new"].features, frontend.speakers["old"].features
    assert saved.speech_token.tolist() == [0, 1, 2, 3] and saved.mel.shape == (8, 80)
    assert plain.speech_token.shape == (0,) and plain.mel.shape == (0, 80) and plain.embedding.shape == (192,)
    assert frontend.speaker_prompt_text("", "new").ids == [1, 2, 3]
    assert frontend.speaker_prompt_text("", "new").with_speech
    assert frontend.speaker_prompt_text("ignored", "old").ids == []


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"embedding": torch.zeros(1, 100)},
        {"embedding": "text"},
        saved_prompt(frames=7),
        {**saved_prompt(), "prompt_speech_feat": torch.ones(3)},
        "text",
    ],
)
def test_a_misshapen_stored_voice_is_named(broken, entry):
    torch.save({"anna": entry}, broken / "spk2info.pt")
    with pytest.raises(CheckpointError, match=r"spk2info\.pt.*anna"):
        Frontend(broken, load_config(broken))


def test_features_of_a_recording_are_aligned(frontend):
    samples, rate = read_audio((GOLDEN / "prompt.wav").read_bytes(), 0.5, 30)
    features = frontend.features(samples, rate)
    assert len(features.mel) == 2 * len(features.speech_token) > 0
    for array, dtype in ((features.speech_token, np.int32), (features.mel, np.float32)):
        assert array.dtype == dtype


@pytest.mark.parametrize("seconds", [0.5, 30.0])
@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
def test_shortest_and_longest_recordings_have_features(frontend, seconds, rate):
    noise = np.random.default_rng(0).normal(0, 0.1, int(seconds * rate)).astype(np.float32)
    features = frontend.features(noise, rate)
    assert abs(len(features.speech_token) - 25 * seconds) <= 1
    assert len(features.mel) == 2 * len(features.speech_token)
    assert np.isfinite(features.mel).all() and np.isfinite(features.embedding).all()


def test_silence_has_finite_features(frontend):
    features = frontend.features(np.zeros(16_000, np.float32), 16_000)
    assert np.isfinite(features.mel).all() and np.isfinite(features.embedding).all()


def test_frontend_of_cosyvoice3(tmp_path):
    checkpoint = GOLDEN3 / "checkpoint"
    frontend = Frontend(checkpoint, load_config3(checkpoint))
    assert frontend.takes_instructions and list(frontend.speakers) == ["tiny_spk"]
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("*.safetensors", "*.pt"))
    (copy / "speech_tokenizer_v3.onnx").rename(copy / "speech_tokenizer_v2.onnx")
    with pytest.raises(CheckpointError, match="speech_tokenizer_v3"):
        Frontend(copy, load_config3(copy))


def test_the_mode_follows_from_the_prompt_text(frontend):
    spoken = frontend.prompt_text("Good morning.")
    instruction = frontend.prompt_text("Speak softly, 2 times<|endofprompt|>")
    assert spoken.with_speech and spoken.ids == frontend.tokenizer.encode("Good morning.")
    assert instruction.ids == frontend.tokenizer.encode("Speak softly, 2 times<|endofprompt|>")
    assert not instruction.with_speech
    assert frontend.prompt_text(" ").ids == [] and not frontend.prompt_text(" ").with_speech


@pytest.mark.parametrize("text", ["", " ", "...", "！？", "\n\t", "\u200b", "\x00", "“”", "! ! !", "\ud800"])
def test_text_without_words_gives_nothing_to_speak(frontend, text):
    assert frontend.split_text(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "🎵 music",
        "a\ud800b",
        "1" * 400,
        "٣ cats",
        "x²",
        "½ cup",
        "a" * 5000,
        "a.b." * 1000,
        "你1。" * 1000,
        "\\ \" ' ` x",
    ],
)
def test_odd_text_is_spoken(frontend, text):
    parts = frontend.split_text(text)
    assert parts and all(parts)


def test_a_number_too_large_to_name_is_read_digit_by_digit(frontend):
    plain = TextNormalizer(len, spellers={})
    assert plain.normalize("7" * 40) == " ".join(["seven"] * 40)


def test_a_failing_speller_leaves_the_text_as_it_is(caplog):
    def fail(text):
        raise AssertionError("no path")

    assert TextNormalizer(len, spellers={"en": fail, "zh": fail}).split("It works") == ["It works."]
    assert "normalisation failed" in caplog.text


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ('He said "Stop." Then', ['He said "Stop."', " Then."]),
        ("A.. B", ["A.", " B."]),
        ('."', ['".']),
        ("", []),
    ],
)
def test_sentences_end_at_marks_and_closing_quotes(text, sentences):
    assert split_sentences(text, "en") == sentences


CLAUSES = "and then we went on, "
LONG = {
    "commas": CLAUSES * 40,
    "blanks": "word after word " * 60,
    "one word": "x" * 1000,
    "one word among others": "He said " + "ha" * 300 + " and went, " * 20,
    "Chinese": "今天天气很好，" * 60,
    "Chinese without marks": "今天天气很好我们去公园玩" * 40,
    "numbers": "it costs 1,000 or more " * 30,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_sentence_too_long_for_one_part_is_cut_and_nothing_of_it_is_lost(text):
    plain = TextNormalizer(len, spellers={})
    pieces = plain.split(f"Hello. {text}")
    assert "".join(pieces).strip("。.") == plain.normalize(f"Hello. {text}").strip("。.")
    assert max(map(len, pieces)) <= MIN_LENGTH + LONGEST_SENTENCE
    assert min(map(len, pieces)) >= MERGE_LENGTH


def test_a_long_sentence_is_cut_after_commas_else_at_blanks(frontend):
    plain = TextNormalizer(len, spellers={})
    assert all(piece.endswith((",", ".")) for piece in plain.split(LONG["commas"]))
    words = set("".join(plain.split(LONG["blanks"])).strip(".").split())
    assert words == {"word", "after"}
    assert all(piece[0] == " " for piece in plain.split(LONG["blanks"])[1:])


def test_an_ordinary_sentence_is_not_cut():
    sentence = (
        "This is a sentence of ordinary length, which a speaker says in one go, without a pause for breath."
    )
    assert TextNormalizer(len, spellers={}).split(sentence) == [sentence]
