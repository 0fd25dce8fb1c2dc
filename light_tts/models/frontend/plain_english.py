"""English text that wetext would give back as it is, recognised without it.

wetext takes milliseconds for a sentence, most of which have nothing in them that it changes. Its grammar
was tried: of 750,000 strings of small letters (a large word list, and all strings of up to four letters),
alone and with a full stop behind them, it changes none, and of sentences of such words only those with
"per" in front of a unit. Words with a capital may be abbreviations (Dr., Mon, Aff), which are the same in
any sentence: so each is tried once, alone. "World" in front of "War I" is the exception.
"""

from __future__ import annotations

import re

from light_tts.models.frontend.spellers import Spell

KEPT_WORDS = 16384
MOST_TRIALS = 8  # of words of one text; with more of them, to spell the text itself costs less
_SMALL = re.compile(r"(?!per\b)[a-z]+(?:['-][a-z]+)*[,.;:!?]?")
_CAPITAL = re.compile(r"(?!World\b)[A-Z][a-z]*(?:'[a-z]+)?[,.;:!?]?")


class PlainEnglish:
    """Thread-safe, as `spell` is: wetext's speller for English."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._tried: dict[str, bool] = {}  # words with a capital, and whether they stay as they are

    def known(self, text: str) -> bool:
        """Whether it is sure, without asking `spell`, that it would not change the text."""
        return all(self._tried.get(word, False) for word in _odd_words(text))

    def __call__(self, text: str) -> bool:
        """Whether `spell` would not change the text; where that is not sure: False."""
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
    """Those that are not of small letters."""
    return {word for word in text.split(" ") if not _SMALL.fullmatch(word)}
