"""Detects speech that stops too early or does not stop."""

from __future__ import annotations

from light_tts.tools.evaluation.lines import Line
from light_tts.tools.evaluation.sound import Sound, read_sound

LETTERS_PER_SECOND = 13.0  # English read aloud, including pauses
SLOWEST, FASTEST = 6.0, 26.0  # plausible range of letters per second of a prompt
LETTERS_OF_A_DIGIT = 5  # it is read as a word
LETTERS_OF_A_CHARACTER = 3  # in Chinese, where it is a syllable

SHORT, LONG = 0.5, 2.0  # fractions of the expected length
LOST_WORDS, EXTRA_WORDS = 2, 3  # at the end; one or two may be recognition errors


def letters(text: str) -> int:
    """Return the number of letters that are read."""
    chinese = sum("\u4e00" <= sign <= "\u9fff" for sign in text)
    return sum(LETTERS_OF_A_DIGIT if sign.isdigit() else sign.isalpha() for sign in text) + chinese * (
        LETTERS_OF_A_CHARACTER - 1
    )


def expected_seconds(line: Line) -> float:
    """Return the duration of the text at the pace of the prompt, or of an average reader if that is
    unknown.
    """
    pace = LETTERS_PER_SECOND
    if line.prompt_wav and line.prompt_text and (said := letters(line.prompt_text)):
        spoken = max(read_sound(line.prompt_wav).spoken_seconds, 1e-3)
        pace = min(max(said / spoken, SLOWEST), FASTEST)
    return max(letters(line.text), 1) / pace


def length_ratio(line: Line, sound: Sound) -> float:
    """Return the length of the speech in `sound`, without silence around it, divided by the expected
    length.
    """
    return sound.spoken_seconds / expected_seconds(line)


def is_cut_off(ratio: float, lost_words: int = 0) -> bool:
    """Return whether the speech stops too early. `lost_words`: number missing at the end."""
    return ratio < SHORT or lost_words >= LOST_WORDS


def ran_away(ratio: float, extra_words: int = 0) -> bool:
    """Return whether the speech continues too long. `extra_words`: number recognised after the end."""
    return ratio > LONG or extra_words >= EXTRA_WORDS
