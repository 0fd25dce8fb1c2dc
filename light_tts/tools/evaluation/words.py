"""Compares written and recognised text: English in the spelling of Whisper's normaliser, Chinese in
simplified characters, each of which counts as a word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_CHINESE = re.compile(r"[\u4e00-\u9fff]")


@cache
def _normaliser() -> Any:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


@cache
def _chinese_normaliser() -> Any:
    import wetext

    return wetext.Normalizer(lang="zh", operator="tn", traditional_to_simple=True)


def language_of(text: str) -> str:
    """Return zh for a text with Chinese characters, else en, like the server."""
    return "zh" if _CHINESE.search(text) else "en"


def normalise(text: str, language: str = "en") -> str:
    """Return the text in lower case, without punctuation, with numbers as digits and American spelling.
    Chinese: only its characters and numbers, simplified and separated by spaces."""
    if language == "zh":
        return " ".join(_CHINESE.findall(_chinese_normaliser().normalize(text))) if text else ""
    return _normaliser()(text).strip()


def _both(reference: str, hypothesis: str) -> tuple[str, str]:
    language = language_of(reference)
    return normalise(reference, language), normalise(hypothesis, language)


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Return (substitutions + deletions + insertions, words of the reference) after normalising both."""
    import jiwer

    found = jiwer.process_words(*_both(reference, hypothesis))
    return found.substitutions + found.deletions + found.insertions, len(found.references[0])


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """The same in characters, including spaces; identical for Chinese."""
    import jiwer

    if language_of(reference) == "zh":
        return word_errors(reference, hypothesis)
    found = jiwer.process_characters(normalise(reference), normalise(hypothesis))
    return found.substitutions + found.deletions + found.insertions, len(found.references[0])


def end_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Return (reference words missing at the end, recognised words after its end)."""
    import jiwer

    (steps,) = jiwer.process_words(*_both(reference, hypothesis)).alignments
    if not steps or steps[-1].type not in ("delete", "insert"):
        return 0, 0
    last = steps[-1]
    return last.ref_end_idx - last.ref_start_idx, last.hyp_end_idx - last.hyp_start_idx


def repeats(reference: str, hypothesis: str) -> int:
    """Return how many more immediate repetitions of one or more words there are than in the reference."""
    written, heard = _both(reference, hypothesis)
    return max(0, _doubled(heard.split()) - _doubled(written.split()))


def _doubled(words: Sequence[str]) -> int:
    count, place = 0, 0
    while place < len(words):
        sizes = range((len(words) - place) // 2, 0, -1)
        size = next((n for n in sizes if words[place : place + n] == words[place + n : place + 2 * n]), 0)
        count += size > 0
        place += size or 1
    return count
