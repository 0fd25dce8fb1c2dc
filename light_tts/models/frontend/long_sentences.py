"""Splits overlong sentences at the best available places. Models are trained on up to half a minute of
speech, and a part has a limited number of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

# Places to split a sentence, in order of preference: after commas, before spaces, anywhere.
_PLACES = (re.compile(r"(?<=[,，、])(?!\d)"), re.compile(r"(?=\s)"), re.compile(r""))


def shorten(text: str, length: Callable[[str], int], most: int) -> list[str]:
    """Split `text` into parts with a length of at most `most`, as far as characters allow; joined they are
    the original text."""
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
