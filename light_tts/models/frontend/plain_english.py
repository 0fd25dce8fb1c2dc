"""Recognises English text that wetext would not change, without running it.

wetext takes milliseconds per sentence, and does not change most sentences. Its grammar was tested on 750,000
lower-case strings (a large word list, and all strings of up to four letters), alone and followed by a full
stop. It changes none of them, and of sentences made of such words only those with "per" before a unit.
Capitalised words may be abbreviations (Dr., Mon, Aff), which are treated the same in every sentence, so each
one is tested once, alone. The only exception is "World" before "War I".
"""

from __future__ import annotations

import re

from light_tts.models.frontend.spellers import Spell

KEPT_WORDS = 16384
MOST_TRIALS = 8  # words tested per text; with more of them it is cheaper to run wetext on the text itself
_SMALL = re.compile(r"(?!per\b)[a-z]+(?:['-][a-z]+)*[,.;:!?]?")
_CAPITAL = re.compile(r"(?!World\b)[A-Z][a-z]*(?:'[a-z]+)?[,.;:!?]?")


class PlainEnglish:
    """Tests whether text is unaffected by `spell`, wetext's English speller. Thread-safe if `spell` is."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._tried: dict[str, bool] = {}  # capitalised word -> whether it stays unchanged

    def known(self, text: str) -> bool:
        """Return whether the text is certainly unaffected, without calling `spell`."""
        return all(self._tried.get(word, False) for word in _odd_words(text))

    def __call__(self, text: str) -> bool:
        """Return whether `spell` would leave the text unchanged; False if unknown."""
        words = _odd_words(text)
        untried = [word for word in words if word not in self._tried]
        if len(untried) > MOST_TRIALS or not all(map(_CAPITAL.fullmatch, words)):
            return False
        if len(self._tried) > KEPT_WORDS:
            self._tried.clear()
        return all([self._stays(word) for word in words])

    def _stays(self, word: str) -> bool:
        if word not in self._tried:
            self._tried[word] = self._spell(word) == word
        return self._tried[word]


def _odd_words(text: str) -> set[str]:
    """Return the words that are not all lower-case letters."""
    return {word for word in text.split(" ") if not _SMALL.fullmatch(word)}
