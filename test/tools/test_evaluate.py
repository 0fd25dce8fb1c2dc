"""The evaluation of speech: what it counts, with a made-up recogniser and speaker encoder, and what it asks
of a real server."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.server_process import PROMPT_TEXT, PROMPT_WAV, ROOT

from light_tts.tools.evaluation import endings, scores, tools, words
from light_tts.tools.evaluation.client import pieces
from scripts import evaluate

RATE = 16_000
PROMPT = "Fifteen letters."  # 14 of them


@pytest.fixture(autouse=True)
def made_up_evaluators(monkeypatch):
    """The recogniser hears what `tone` hid in the loudness; a voice is the loudness, too."""
    monkeypatch.setattr(evaluate, "missing", lambda measures, languages: {})
    monkeypatch.setattr(scores, "transcribe", hear)
    monkeypatch.setattr(scores, "embed", embed)


HEARD: dict[int, str] = {}


def hear(wave: np.ndarray, language: str) -> str:
    return HEARD[round(100 * float(np.abs(wave).max()))]


def embed(wave: np.ndarray) -> np.ndarray:
    angle = np.abs(wave).max() * np.pi / 2
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def tone(path: Path, seconds: float, percent: int, heard: str = "") -> str:
    """A tone of `percent` of full scale between two silences, in which the recogniser hears `heard`."""
    wave = np.tile([1.0, -1.0], round(seconds * RATE / 2)) * percent / 100
    silence = np.zeros(RATE // 2)
    soundfile.write(path, np.concatenate([silence, wave, silence]), RATE, subtype="FLOAT")
    HEARD[percent] = heard
    return path.name


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(tmp_path: Path, *arguments: object) -> tuple[int, dict]:
    report = tmp_path / "report.json"
    code = evaluate.main([*map(str, arguments), "--json", str(report)])
    return code, json.loads(report.read_text())


# ---------------------------------------------------------------- what is counted


@pytest.mark.parametrize(
    ("reference", "heard", "errors", "length", "ends", "repeated"),
    [
        ("The colour is grey!", "the color is gray", 0, 4, (0, 0), 0),
        ("He paid twenty one dollars.", "He paid $21", 0, 3, (0, 0), 0),
        ("One dog, two cats.", "", 4, 4, (4, 0), 0),
        ("The dog ran home.", "the dog", 2, 4, (2, 0), 0),
        ("The dog ran home.", "the dog ran home and on and on", 4, 4, (0, 4), 1),
        ("It was very very late.", "it was very very late", 0, 5, (0, 0), 0),
        ("The dog ran home.", "the dog ran the dog ran home", 3, 4, (0, 0), 1),
        ("Seen by nobody at the end of it.", "seen by nobody at the end of it " * 2, 8, 8, (0, 8), 1),
        ("!", "a word", 2, 0, (0, 2), 0),
    ],
)
def test_words_are_counted(reference, heard, errors, length, ends, repeated):
    assert words.word_errors(reference, heard) == (errors, length)
    assert words.end_errors(reference, heard) == ends
    assert words.repeats(reference, heard) == repeated


@pytest.mark.parametrize(
    ("heard", "errors"),
    [
        ("今天我買了5本書", 0),
        ("今天，我买了五本书。", 0),
        ("今天我买五本书籍", 2),
        ("", 8),
    ],
)
def test_a_chinese_word_is_a_simplified_character(heard, errors):
    assert words.language_of("今天我买了五本书。") == "zh" != words.language_of(PROMPT)
    assert words.word_errors("今天我买了五本书。", heard) == (errors, 8)
    assert words.character_errors("今天我买了五本书。", heard) == (errors, 8)


def test_a_chinese_character_is_as_long_as_a_syllable():
    assert endings.letters("你好，Bob") == 2 * endings.LETTERS_OF_A_CHARACTER + 3


def test_characters_are_counted():
    assert words.character_errors("A cat.", "a bad") == (2, 5)


def test_a_digit_is_as_long_as_a_word():
    assert endings.letters("In 1984, he left.") == 2 + 4 * endings.LETTERS_OF_A_DIGIT + 6


def test_a_text_in_pieces_is_still_that_text():
    text = " One two  three four\nfive. "
    assert "".join(pieces(text)) == text and len(list(pieces(text))) == 2


# ---------------------------------------------------------------- sounds that are there


def test_speech_is_measured_against_the_pace_of_its_prompt(tmp_path):
    """The prompt takes 1.4 s, so that 28 letters should take 2.8 s."""
    prompt = tone(tmp_path / "prompt.wav", 1.4, 20)
    text = "The dogs of our street bark at noon."  # 28 letters
    lengths = {"good": 2.8, "short": 1.2, "long": 5.8, "lost": 2.8, "extra": 2.8}
    heard = dict.fromkeys(lengths, text)
    heard["lost"], heard["extra"] = "the dogs of our street bark", text + " and then they sleep"
    lines = [
        {"wav": tone(tmp_path / f"{name}.wav", seconds, 30 + number, heard[name]), "text": text}
        | {"prompt_wav": prompt, "prompt_text": PROMPT, "voice": name}
        for number, (name, seconds) in enumerate(lengths.items())
    ]
    code, found = run(tmp_path, "--wavs", write(tmp_path / "list.jsonl", lines), "--measures", "wer")
    assert code == 0
    takes = {take["voice"]: take for take in found["takes"]}
    assert takes["good"]["length_ratio"] == pytest.approx(1.0, abs=0.02)
    assert {name for name, take in takes.items() if take["cut_off"]} == {"short", "lost"}
    assert {name for name, take in takes.items() if take["ran_away"]} == {"long", "extra"}
    summary = found["summary"]
    assert (summary["cut_off"], summary["ran_away"], summary["with_repeats"]) == (2, 2, 0)
    assert summary["wer"] == pytest.approx((2 + 4) / 40)
    assert found["voices"]["extra"]["wer"] == pytest.approx(4 / 8)
    assert summary["rtf"] is None and summary["similarity"] is None and summary["mos"] is None


def test_the_own_prompt_is_compared_with_those_of_other_voices(tmp_path):
    """Louder is another voice; `b` has two prompts, and of its own only the one that was used counts."""
    prompts = {"a": 10, "b": 50, "b2": 52, "c": 90}
    names = {name: tone(tmp_path / f"{name}.wav", 1.0, percent) for name, percent in prompts.items()}
    lines = [
        {"wav": tone(tmp_path / f"{number}.wav", 1.0, percent), "text": "x", "voice": prompt[0]}
        | {"prompt_wav": names[prompt]}
        for number, (prompt, percent) in enumerate(
            [("a", 12), ("b", 55), ("b2", 48), ("c", 60)]  # the last one sounds like b
        )
    ]
    code, found = run(tmp_path, "--wavs", write(tmp_path / "list.jsonl", lines), "--measures", "similarity")
    assert code == 0
    assert found["summary"]["own_prompt_first"] == 0.75
    assert found["voices"]["c"]["own_prompt_first"] == 0.0 and found["voices"]["b"]["takes"] == 2
    take = found["takes"][3]
    assert take["similarity"] == pytest.approx(np.cos(0.30 * np.pi / 2), abs=1e-3)
    assert take["other"] == pytest.approx(np.cos(0.08 * np.pi / 2), abs=1e-3)
    assert found["summary"]["wer"] is None


def test_a_sound_that_cannot_be_read_is_counted(tmp_path, capsys):
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    good = {"wav": tone(tmp_path / "a.wav", 1.0, 40, "hello there"), "text": "Hello there."}
    lines = [{"wav": "broken.wav", "text": "Hello."}, good]
    code, found = run(tmp_path, "--wavs", write(tmp_path / "list.jsonl", lines), "--measures", "wer")
    assert code == 1
    assert found["summary"]["failed"] == 1 and found["summary"]["wer"] == 0.0
    assert found["failures"][0]["text"] == "Hello." and "broken.wav" in found["failures"][0]["error"]
    assert "broken.wav" in capsys.readouterr().out


# ---------------------------------------------------------------- what is missing or wrong


def test_a_measure_that_lacks_a_package_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "missing", tools.missing)
    monkeypatch.setattr(tools, "find_spec", lambda module: None if module == "distillmos" else object())
    lines = [{"wav": tone(tmp_path / "a.wav", 1.0, 41, "hello"), "text": "Hello."}]
    code, found = run(tmp_path, "--wavs", write(tmp_path / "list.jsonl", lines), "--measures", "wer,mos")
    assert code == 0 and found["summary"]["wer"] == 0.0 and found["summary"]["mos"] is None
    assert found["left_out"] == {"mos": f"{tools.ALONE} distillmos"}
    assert "mos is left out; it needs: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "set.jsonl:2"),
        ("[]", "not a JSON object"),
        ('{"text": "x", "prompt_text": "y"}', "prompt_wav is missing"),
        ('{"text": 1, "prompt_wav": "good.wav", "prompt_text": "y"}', "text is not a string"),
        ('{"text": "x", "prompt_wav": "gone.wav", "prompt_text": "y"}', "gone.wav is not there"),
        ('{"text": "x", "prompt_wav": "set.jsonl", "prompt_text": "y"}', "set.jsonl: audio file format"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, capsys, line, message):
    good = {"text": "x", "prompt_wav": tone(tmp_path / "good.wav", 1.0, 42), "prompt_text": "y"}
    (tmp_path / "set.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    assert evaluate.main([str(tmp_path / "set.jsonl")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a set or --wavs"),
        (["x", "--wavs", "y"], "either a set or --wavs"),
        (["--wavs", "y", "--save", "z"], "--save"),
        (["x", "--measures", "pesq"], "'pesq' is none of wer, similarity, mos"),
        (["x", "--limit", "0"], "--limit"),
    ],
)
def test_a_wrong_argument_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def golden_line(text: str) -> dict:
    return {"text": text, "prompt_wav": str(PROMPT_WAV), "prompt_text": PROMPT_TEXT, "voice": "golden"}


def test_a_server_that_is_not_there_is_named(tmp_path, capsys):
    set_file = write(tmp_path / "set.jsonl", [golden_line("Hello.")])
    assert evaluate.main([str(set_file), "--url", "http://127.0.0.1:9"]) == 2
    assert "no server at http://127.0.0.1:9" in capsys.readouterr().err


def test_it_runs_as_a_script(tmp_path):
    sounds = write(tmp_path / "list.jsonl", [{"wav": tone(tmp_path / "a.wav", 1.0, 43), "text": "Hello."}])
    command = [sys.executable, "scripts/evaluate.py", "--wavs", str(sounds), "--measures", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "scored 1 of 1" in done.stderr, done.stderr


# ---------------------------------------------------------------- a real server


@pytest.mark.parametrize("mode", ["whole", "stream", "bistream"])
def test_a_server_is_evaluated_and_a_failing_request_counted(server, tmp_path, capsys, mode):
    texts = ("Good morning.", "This is refused: \0", "The train was late.")
    speech = tmp_path / "speech"
    set_file = write(tmp_path / "set.jsonl", map(golden_line, texts))
    options = ("--url", server.url, "--mode", mode, "--measures", "none", "--save", speech)
    code, found = run(tmp_path, set_file, *options)
    shown = capsys.readouterr()
    assert code == 1
    assert "spoken 3 of 3, 1 failed" in shown.err and "scored 3 of 3" in shown.err
    assert found["failures"][0]["text"] == texts[1] and "null character" in found["failures"][0]["error"]
    assert [take["text"] for take in found["takes"]] == list(texts)
    summary = found["summary"]
    assert (summary["takes"], summary["failed"]) == (3, 1)
    assert summary["first_audio"]["p50"] > 0 and summary["rtf"]["max"] > 0
    for line in ("voice ", "golden ", "RTF ", "first audio ", "failed "):
        assert line in shown.out
    kept = [json.loads(line) for line in (speech / "list.jsonl").read_text().splitlines()]
    assert [line["text"] for line in kept] == [texts[0], texts[2]]
    code, again = run(tmp_path, "--wavs", speech / "list.jsonl", "--measures", "none")
    assert code == 0 and again["summary"]["audio_seconds"] == pytest.approx(summary["audio_seconds"])
    assert again["summary"]["length_ratio"] == pytest.approx(summary["length_ratio"], rel=0.05)


def test_speech_that_lasts_as_long_as_it_may_is_counted(server, tmp_path, monkeypatch):
    monkeypatch.setattr("light_tts.tools.evaluation.client.LONGEST", 0.0)
    monkeypatch.setattr("light_tts.tools.evaluation.client.SHORTEST_LIMIT", 0.4)
    set_file = write(tmp_path / "set.jsonl", [golden_line("No.")])
    code, found = run(tmp_path, set_file, "--url", server.url, "--measures", "none")
    assert code == 0 and found["summary"]["at_limit"] == 1 and found["takes"][0]["seconds"] == 0.4
