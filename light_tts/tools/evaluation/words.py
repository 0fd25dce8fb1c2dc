"""Written and heard text compared, both in the spelling of Whisper's English normaliser."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


@cache
def _normaliser() -> Any:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def normalise(text: str) -> str:
    """In lower case, without punctuation, with numbers as digits and American spelling."""
    return _normaliser()(text).strip()


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """(substitutions + deletions + insertions, words of the reference), after normalising both."""
    import jiwer

    found = jiwer.process_words(normalise(reference), normalise(hypothesis))
    return found.substitutions + found.deletions + found.insertions, len(found.references[0])


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """The same in characters, blanks included."""
    import jiwer

    found = jiwer.process_characters(normalise(reference), normalise(hypothesis))
    return found.substitutions + found.deletions + found.insertions, len(found.references[0])


def end_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """(words of the reference that are missing at the end, words heard after it ended)."""
    import jiwer

    (steps,) = jiwer.process_words(normalise(reference), normalise(hypothesis)).alignments
    if not steps or steps[-1].type not in ("delete", "insert"):
        return 0, 0
    last = steps[-1]
    return last.ref_end_idx - last.ref_start_idx, last.hyp_end_idx - last.hyp_start_idx


def repeats(reference: str, hypothesis: str) -> int:
    """How many times more often than in the reference a word or several are said twice in a row."""
    return max(0, _doubled(normalise(hypothesis).split()) - _doubled(normalise(reference).split()))


def _doubled(words: Sequence[str]) -> int:
    count, place = 0, 0
    while place < len(words):
        sizes = range((len(words) - place) // 2, 0, -1)
        size = next((n for n in sizes if words[place : place + n] == words[place + n : place + 2 * n]), 0)
        count += size > 0
        place += size or 1
    return count
