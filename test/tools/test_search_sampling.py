"""The search for the sampling that suits a checkpoint."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from support.server_process import CHECKPOINT, PROMPT_TEXT, PROMPT_WAV, speak

from light_tts.common.sampling_rule import SamplingRule
from light_tts.engine.speech.token2wav import to_pcm16
from light_tts.tools.evaluation.lines import Line
from light_tts.tools.evaluation.local import LocalSpeaker, most_tokens
from scripts import search_sampling

RULES = [SamplingRule(0.8, 25, 10, 0.1), SamplingRule(0.5, 8, 20, 0.2, 0.7)]
TEXTS = ["No.", "Yes, he did.", "Who?"]


def test_what_is_spoken_is_what_the_server_speaks(server):
    line = Line("Hello there.", "golden", PROMPT_WAV, PROMPT_TEXT)
    speaker = LocalSpeaker(CHECKPOINT, torch.device("cpu"))
    spoken = speaker.tokens([(line, rule, 5) for rule in RULES])
    assert spoken[0] != spoken[1]
    limits = {"min_new_tokens": None, "max_new_tokens": most_tokens(line)}
    with server.client() as client:
        for rule, parts in zip(RULES, spoken, strict=True):
            answer = speak(client, line.text, seed=5, **limits, **asdict(rule))
            expected = np.frombuffer(answer.content, np.int16).astype(int)
            wave = to_pcm16(speaker.sound(line, parts, 5).wave)
            assert len(wave) == len(expected) and np.abs(wave - expected).max() < 33  # of 32768


def search(tmp_path, capsys, *arguments: object) -> tuple[list[dict], str]:
    """-> the results that are there afterwards, and the last table."""
    set_file, results = tmp_path / "set.jsonl", tmp_path / "results.jsonl"
    line = {"prompt_wav": str(PROMPT_WAV), "prompt_text": PROMPT_TEXT, "voice": "golden"}
    set_file.write_text("".join(json.dumps({"text": text, **line}) + "\n" for text in TEXTS))
    given = (set_file, "--model_dir", CHECKPOINT, "--results", results, "--measures", "none", *arguments)
    assert search_sampling.main([*map(str, given)]) == 0
    found = [json.loads(text) for text in results.read_text().splitlines()]
    return found, capsys.readouterr().out.strip().rpartition("\n\n")[2]


def test_a_search_goes_on_where_it_was_broken_off(tmp_path, capsys):
    first, _ = search(tmp_path, capsys, "--limit", 2, "--lines", 1, "--rules", "yaml", "0.5/8/0.2/20/0.7")
    assert [(take["rule"], take["line"]) for take in first] == [
        ("0.8/25/0.1", 0),
        ("0.5/8/0.2/20/0.7", 0),
        ("0.8/25/0.1", 1),
        ("0.5/8/0.2/20/0.7", 1),
    ]
    again, table = search(tmp_path, capsys, "--limit", 2, "--rules", "yaml", "0.5/8/0.2/20/0.7")
    assert again == first and [row.split()[:2] for row in table.splitlines()[1:]] == [
        ["0.8/25/0.1", "2"],
        ["0.5/8/0.2/20/0.7", "2"],
    ]
    more, _ = search(tmp_path, capsys, "--repeats", 2, "--save", tmp_path / "speech")
    assert more[:4] == first
    assert {(take["line"], take["repeat"]) for take in more[4:]} == {(2, 0), (0, 1), (1, 1), (2, 1)}
    assert len(list((tmp_path / "speech").glob("*.wav"))) == 4
    assert more[4]["score"]["seconds"] > 0


def test_the_error_of_the_word_error_rate_is_that_of_the_lines():
    def takes(errors: list[int]) -> list[search_sampling.Score]:
        return [search_sampling.Score("", "", word_errors=count, words=10) for count in errors]

    assert search_sampling.wer_error(takes([2] * 30)) == 0
    assert search_sampling.wer_error(takes([0, 4] * 50)) == pytest.approx(0.02, rel=0.2)
    assert search_sampling.wer_error([]) is None


@pytest.mark.parametrize("rule", ["0.8", "0.8/25", "a/b/c", "0.8/2.5/0.1", "1/2/3/4/5/6"])
def test_a_wrong_rule_is_named(tmp_path, capsys, rule):
    with pytest.raises(SystemExit):
        search_sampling.main(["set.jsonl", "--model_dir", "x", "--results", "y", "--rules", rule])
    assert f"{rule!r} is not top_p/top_k/tau_r" in capsys.readouterr().err


def test_a_file_that_holds_something_else_is_named(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(AssertionError):
        search(tmp_path, capsys)
    assert "results.jsonl:1: not a result of a search" in capsys.readouterr().err
