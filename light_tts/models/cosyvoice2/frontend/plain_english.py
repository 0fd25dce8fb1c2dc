"""English text that wetext would give back as it is, recognised without it.

wetext takes milliseconds for a sentence, most of which have nothing in them that it changes. Its grammar
was tried: of 750,000 strings of small letters (a large word list, and all strings of up to four letters),
alone and with a full stop behind them, it changes none, and of sentences of such words only those with
"per" in front of a unit. Words with a capital may be abbreviations (Dr., Mon, Aff), which are the same in
any sentence: so each is tried once, alone.
"""

from __future__ import annotations

import re
from functools import lru_cache

from light_tts.models.cosyvoice2.frontend.spellers import Spell

KEPT_WORDS = 16384
_SMALL = re.compile(r"(?!per\b)[a-z]+(?:['-][a-z]+)*[,.;:!?]?")
_CAPITAL = re.compile(r"[A-Z][a-z]*(?:'[a-z]+)?[,.;:!?]?")


def sparing(spell: Spell) -> Spell:
    """What `spell`, wetext's speller for English, gives, which is asked only where it may change a text."""
    is_plain = PlainEnglish(spell)
    return lambda text: text if is_plain(text) else spell(text)


class PlainEnglish:
    """Thread-safe, as `spell` is: wetext's speller for English."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._known = lru_cache(KEPT_WORDS)(self._stays)

    def __call__(self, text: str) -> bool:
        """Whether `spell` would not change the text; where that is not sure: False."""
        others = {word for word in text.split(" ") if not _SMALL.fullmatch(word)}
        return all(map(_CAPITAL.fullmatch, others)) and all(map(self._known, others))

    def _stays(self, word: str) -> bool:
        return self._spell(word) == word
