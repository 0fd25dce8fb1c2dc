"""The prompt texts of CosyVoice3: every one contains <|endofprompt|>, and no instruction is ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from light_tts.common.instructions import MisplacedMark
from light_tts.models.checkpoint.cosyvoice3_config import load_config3
from light_tts.models.frontend.frontend import Frontend
from light_tts.models.frontend.prompt_text import PromptText, PromptTexts

GOLDEN = Path("test/golden/cosyvoice3")
SYSTEM = "You are a helpful assistant."
MARK = "<|endofprompt|>"
PLAIN = SYSTEM + MARK
SOFTLY = f"{SYSTEM} Speak softly.{MARK}"


@pytest.fixture(scope="module")
def frontend() -> Frontend:
    return Frontend(GOLDEN / "checkpoint", load_config3(GOLDEN / "checkpoint"))


def spelled(frontend: Frontend, prompt: PromptText) -> tuple[str, str]:
    """Return the text of the leading ids and of the others."""
    decode = frontend.tokenizer._encoding.decode
    leading, transcript = prompt.ids[: prompt.leading], prompt.ids[prompt.leading :]
    return decode(leading, skip_special_tokens=False), decode(transcript)


@pytest.mark.parametrize(
    ("text", "leading", "transcript"),
    [
        ("I have 3 cats.", PLAIN, "I have three cats."),
        (f"{PLAIN}I have 3 cats.", PLAIN, "I have three cats."),
        (f"Speak 2 times.{MARK}I have 3 cats.", f"Speak 2 times.{MARK}", "I have three cats."),
        (f"{MARK}Good morning.", MARK, "Good morning."),
        (f"a{MARK}b{MARK}Good morning.", f"a{MARK}b{MARK}", "Good morning."),
        (f"Speak softly.{MARK}", SOFTLY, ""),
        (f"Speak softly. {MARK} ", SOFTLY, ""),
        (SOFTLY, SOFTLY, ""),
        (PLAIN, PLAIN, ""),
        (MARK, PLAIN, ""),
        ("", PLAIN, ""),
        (" ", PLAIN, ""),
    ],
)
def test_a_prompt_text_has_one_leading_part(frontend, text, leading, transcript):
    prompt = frontend.prompt_text(text)
    assert spelled(frontend, prompt) == (leading, transcript)
    assert prompt.with_speech == bool(transcript)
    assert frontend.at_once("hello", text)
    assert frontend.prompt_text(text) is prompt


def test_prompts_that_need_a_speller_are_not_done_at_once(frontend):
    for text in ("It is 17 now.", f"{PLAIN}It is 17 now."):
        assert not frontend.at_once("", text)


def test_golden_prompt_text(frontend):
    expected = np.load(GOLDEN / "e2e.npz")
    prompt = frontend.prompt_text(str(expected["prompt_text"]))
    assert prompt.ids == expected["prompt_text_ids"].tolist() and prompt.with_speech
    assert frontend.split_text(str(expected["text"])) == [expected["text_ids"].tolist()]


@pytest.mark.parametrize(
    ("text", "stored", "leading", "transcript"),
    [
        ("", "", PLAIN, ""),
        ("", "Good morning.", PLAIN, "Good morning."),
        ("", f"{PLAIN}Good morning.", PLAIN, "Good morning."),
        ("", SOFTLY, SOFTLY, ""),
        ("ignored", "Good morning.", PLAIN, "Good morning."),
        (f"Speak softly.{MARK}", "Good morning.", SOFTLY, ""),
        (f"Speak softly.{MARK}", f"{PLAIN}Good morning.", SOFTLY, ""),
        (f"{SOFTLY}ignored", f"{PLAIN}Good morning.", SOFTLY, "Good morning."),
        (f"{SOFTLY}ignored", "Good morning.", SOFTLY, "Good morning."),
    ],
)
def test_a_stored_voice_has_a_transcript_of_its_own(frontend, text, stored, leading, transcript):
    texts = PromptTexts(frontend.tokenizer, frontend.normalizer, SYSTEM)
    prompt = texts.stored(text, frontend.tokenizer.encode(stored))
    assert spelled(frontend, prompt) == (leading, transcript)
    assert prompt.with_speech == bool(transcript)


def test_a_stored_voice_of_the_checkpoint(frontend):
    assert frontend.speaker_prompt_text("", "tiny_spk") == frontend.prompt_text("")
    assert frontend.speaker_prompt_text(f"Softly.{MARK}", "tiny_spk") == frontend.prompt_text(
        f"Softly.{MARK}"
    )


def test_the_beginning_of_a_text_is_moved_to_the_prompt_text(frontend):
    assert frontend.separated(f"{PLAIN}Hello.", "") == ("Hello.", PLAIN)
    assert frontend.separated(f"{SOFTLY}Hello.", "Good morning.") == ("Hello.", f"{SOFTLY}Good morning.")
    assert frontend.separated("Hello.", SOFTLY) == ("Hello.", SOFTLY)
    with pytest.raises(MisplacedMark, match="both"):
        frontend.separated(f"{PLAIN}Hello.", SOFTLY)


def test_other_families_have_no_leading_part(frontend):
    plain = PromptTexts(frontend.tokenizer, frontend.normalizer, system="")
    encode = frontend.tokenizer.encode
    assert plain("") == PromptText([], with_speech=False)
    assert plain("Hello.") == PromptText(encode("Hello."), with_speech=True)
    assert plain(f"Softly.{MARK}") == PromptText(encode(f"Softly.{MARK}"), with_speech=False)
    assert plain(f"{PLAIN}Hello.") == PromptText(encode(f"{PLAIN}Hello."), with_speech=True)
    assert plain.separated(f"{PLAIN}Hello.", "") == (f"{PLAIN}Hello.", "")


def streamed(frontend: Frontend, text: str, length: int) -> list[int]:
    """Return the ids of a text that arrives in pieces of this length."""
    stream = frontend.text_stream()
    pieces = [text[start : start + length] for start in range(0, len(text), length)]
    return [id_ for piece in pieces for id_ in stream.append(piece)] + stream.finish()


@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("text", [f"{PLAIN}I am here.", SYSTEM, "You are", "You are here, I think."])
def test_streamed_text_is_spoken_without_the_system_prompt(frontend, text, length):
    spoken = text.removeprefix(PLAIN)
    assert streamed(frontend, text, length) == frontend.split_text(spoken)[0]


@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("text", [f"{SOFTLY}I am here.", f"Hello.{MARK}", f"{PLAIN}{MARK}Hello."])
def test_streamed_text_has_no_instruction(frontend, text, length):
    with pytest.raises(MisplacedMark, match="prompt text"):
        streamed(frontend, text, length)
