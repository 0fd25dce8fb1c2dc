"""Cheap test whether a text contains anything to speak, based on its characters."""

from __future__ import annotations

import unicodedata

# Symbols that the normaliser expands to a word even when they stand alone.
SPOKEN_SYMBOLS = frozenset("#$%&*+=@^_|~£¥§©®°₩€™")


def is_speakable(text: str) -> bool:
    """Return whether the text contains more than punctuation, symbols and whitespace."""
    return any(unicodedata.category(character)[0] not in "PSZC" for character in text)


def can_become_speakable(text: str) -> bool:
    """The same for a text that has not been normalised yet."""
    return is_speakable(text) or not SPOKEN_SYMBOLS.isdisjoint(text)
