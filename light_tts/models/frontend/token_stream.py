"""Ids of a text that arrives bit by bit: those of the whole text, as soon as later text cannot change them.

The tokenizer takes special tokens out, composes accents (NFC), cuts what is left into words by a pattern and
encodes each word alone. So all words but the last are settled: text behind it may only make it longer. Of a
word of letters that cannot wait for its end (Chinese has no blanks: a clause is a word), those tokens are
settled that all its continuations begin with.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate

from light_tts.models.frontend.tokenizer import TextTokenizer

_COMPOSED = re.compile("[\u4e00-\u9fff]")  # characters that no accent changes


class TokenStream:
    """The ids that `tokenizer` gives for a text, piece by piece."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = re.compile("|".join(map(re.escape, tokenizer.special_tokens)))
        self._begun_special = {
            token[:end] for token in tokenizer.special_tokens for end in range(1, len(token))
        }
        self._waiting = ""

    def append(self, text: str) -> list[int]:
        """The ids that are settled now."""
        text = self._waiting + text
        end = max((match.end() for match in self._special.finditer(text)), default=0)
        ids = self._tokenizer.encode(text[:end]) if end else []
        text = unicodedata.normalize("NFC", text[end:])
        end = self._settled_words(text)
        if end:
            ids += self._tokenizer.encode(text[:end])
        settled, begin = self._settled_tokens(text[end:])
        self._waiting = text[end + begin :]
        return ids + settled

    def flush(self) -> list[int]:
        """The ids of all that has come, but for blanks at its end, whatever may follow."""
        text = self._waiting.rstrip()
        self._waiting = self._waiting[len(text) :]
        return self._tokenizer.encode(text)

    def finish(self, ending: str = "") -> list[int]:
        """The rest of the ids: without blanks at the end, with `ending` instead."""
        text, self._waiting = self._waiting.rstrip() + ending, ""
        return self._tokenizer.encode(text)

    def _settled_words(self, text: str) -> int:
        """How far a text without special tokens has words that stay as they are."""
        known = text[: self._begun(text)]
        solid = known.rstrip()
        borders = self._tokenizer.words(solid)
        if solid and len(known) > len(solid) and known[len(solid)] not in "\r\n":
            borders.append(len(solid))
        return max((border for border in borders if _divides(text, border)), default=0)

    def _begun(self, text: str) -> int:
        """Where a special token begins that is not complete yet, if there is one; else the end."""
        longest = max(map(len, self._begun_special))
        begins = range(max(0, len(text) - longest), len(text))
        return next((begin for begin in begins if text[begin:] in self._begun_special), len(text))

    def _settled_tokens(self, word: str) -> tuple[list[int], int]:
        """(ids of the begin of a word of letters, how many of its characters they are); what is left of it
        has to be a word by itself."""
        letters = word.isalpha() or (word[1:].isalpha() and word[0] != "'")  # as in it's
        if not letters or len(self._tokenizer.words(word)) > 1 or self._begun(word) < len(word):
            return [], 0
        if not unicodedata.is_normalized("NFC", word):
            return [], 0
        known = word if _COMPOSED.fullmatch(word[-1]) else word[:-1]
        tokens = self._tokenizer.settled(known) if known else []
        ids: list[int] = []
        size = 0
        whole: tuple[list[int], int] = ([], 0)  # up to a border between characters
        ends = set(accumulate(len(character.encode()) for character in known))
        for token, length in tokens:
            ids.append(token)
            size += length
            if size in ends:
                whole = list(ids), size
        return whole[0], len(known.encode()[: whole[1]].decode())


def _divides(text: str, border: int) -> bool:
    """Whether the text can be encoded in two there: no accent behind it joins what is before, and blanks
    before it, which become other words with text behind them than without, are not left alone."""
    after = text[border]
    joins = unicodedata.category(after).startswith("M") or "\u1160" <= after <= "\u11ff"
    return not joins and not text[border - 1 : border].isspace()
