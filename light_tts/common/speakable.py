"""Whether a text has anything to speak: a look at its characters, before any work is done for it."""

from __future__ import annotations

import unicodedata

# Symbols for which the normaliser has a word also where they stand alone.
SPOKEN_SYMBOLS = frozenset("#$%&*+=@^_|~£¥§©®°₩€™")


def is_speakable(text: str) -> bool:
    """Whether there is more in it than punctuation, symbols and blanks."""
    return any(unicodedata.category(character)[0] not in "PSZC" for character in text)


def can_become_speakable(text: str) -> bool:
    """The same of a text that is still to be normalised."""
    return is_speakable(text) or not SPOKEN_SYMBOLS.isdisjoint(text)
