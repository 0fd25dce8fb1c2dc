"""Incremental tokenization: returns the ids of the whole text as soon as later text cannot change them.

The tokenizer extracts special tokens, composes accents (NFC), splits the rest into words by a pattern and
encodes each word alone. So all words except the last one are final: later text can only extend that one. If
the end of a word of letters cannot be awaited (Chinese has no spaces, so a clause is a word), the tokens with
which all its continuations begin are final.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate

from light_tts.models.frontend.tokenizer import TextTokenizer

_COMPOSED = re.compile("[\u4e00-\u9fff]")  # characters that combining accents do not change


class TokenStream:
    """Returns the ids that `tokenizer` produces for a text, piece by piece."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_strings
        self._waiting = ""

    def append(self, text: str) -> list[int]:
        """Return the ids that are final now."""
        text = self._waiting + text
        end = max((match.end() for match in self._special.pattern.finditer(text)), default=0)
        ids = self._tokenizer.encode(text[:end]) if end else []
        text = unicodedata.normalize("NFC", text[end:])
        end = self._settled_words(text)
        if end:
            ids += self._tokenizer.encode(text[:end])
        settled, begin = self._settled_tokens(text[end:])
        self._waiting = text[end + begin :]
        return ids + settled

    def flush(self) -> list[int]:
        """Return the ids of the text so far, except trailing whitespace, whatever may follow."""
        text = self._waiting.rstrip()
        self._waiting = self._waiting[len(text) :]
        return self._tokenizer.encode(text)

    def finish(self, ending: str = "") -> list[int]:
        """Return the remaining ids, with `ending` instead of trailing whitespace."""
        text, self._waiting = self._waiting.rstrip() + ending, ""
        return self._tokenizer.encode(text)

    def _settled_words(self, text: str) -> int:
        """Return the end of the final words in a text without special tokens."""
        known = text[: self._special.complete(text)]
        solid = known.rstrip()
        borders = self._tokenizer.words(solid)
        if solid and len(known) > len(solid) and known[len(solid)] not in "\r\n":
            borders.append(len(solid))
        return max((border for border in borders if _divides(text, border)), default=0)

    def _settled_tokens(self, word: str) -> tuple[list[int], int]:
        """Return (final ids at the start of a word of letters, number of characters they cover); the
        remainder must form a word by itself."""
        letters = word.isalpha() or (word[1:].isalpha() and word[0] != "'")  # as in "it's"
        if not letters or len(self._tokenizer.words(word)) > 1 or self._special.complete(word) < len(word):
            return [], 0
        if not unicodedata.is_normalized("NFC", word):
            return [], 0
        known = word if _COMPOSED.fullmatch(word[-1]) else word[:-1]
        tokens = self._tokenizer.settled(known) if known else []
        ids: list[int] = []
        size = 0
        whole: tuple[list[int], int] = ([], 0)  # up to a character boundary
        ends = set(accumulate(len(character.encode()) for character in known))
        for token, length in tokens:
            ids.append(token)
            size += length
            if size in ends:
                whole = list(ids), size
        return whole[0], len(known.encode()[: whole[1]].decode())


def _divides(text: str, border: int) -> bool:
    """Return whether the text can be encoded in two parts split there: no accent after it combines with a
    character before it, and spaces before it, which form other words depending on what follows, are not
    separated."""
    after = text[border]
    joins = unicodedata.category(after).startswith("M") or "\u1160" <= after <= "\u11ff"
    return not joins and not text[border - 1 : border].isspace()
