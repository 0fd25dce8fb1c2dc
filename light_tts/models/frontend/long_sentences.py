"""Sentences without end marks that are too long to be spoken in one go, in parts at the best places there
are: a model is trained with half a minute of speech, and one part has a limit of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

# Between these a sentence may be cut, the best first: after commas, before blanks, anywhere.
_PLACES = (re.compile(r"(?<=[,，、])(?!\d)"), re.compile(r"(?=\s)"), re.compile(r""))


def shorten(text: str, length: Callable[[str], int], most: int) -> list[str]:
    """`text` in parts of at most `most` each, as far as characters allow; joined they are the text again."""
    return _shorten(text, length, most, _PLACES)


def _shorten(
    text: str, length: Callable[[str], int], most: int, places: tuple[re.Pattern[str], ...]
) -> list[str]:
    if length(text) <= most or not places:
        return [text]
    parts: list[str] = []
    current, taken = "", 0
    for clause in filter(None, places[0].split(text)):
        for part in _shorten(clause, length, most, places[1:]):
            needed = length(part)
            if current and taken + needed > most:
                parts.append(current)
                current, taken = "", 0
            current += part
            taken += needed
    return [*parts, current]
