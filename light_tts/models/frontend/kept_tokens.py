"""Special tokens inside a text, like [breath] and <strong>, which normalisation must not change.

While a text is normalised, each of them is hidden, that is, replaced by one character of a private range.
Only the text between them is expanded to words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from light_tts.models.frontend.token_strings import TokenStrings

_FIRST, _LAST = 0x10F000, 0x10FFFD
PRIVATE = f"{chr(_FIRST)}-{chr(_LAST)}"  # for a character class; texts of clients must not contain these

_HIDDEN = re.compile(f"([{PRIVATE}]+)")


class KeptTokens:
    """`tokens`: those to keep; none is the beginning of another one."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._characters = {token: chr(_FIRST + index) for index, token in enumerate(tokens)}
        self._tokens = {ord(character): token for token, character in self._characters.items()}
        self._strings = TokenStrings(tokens)

    def hide(self, text: str) -> str:
        """Return the text with a private character in place of each token."""
        return self._strings.pattern.sub(lambda match: self._characters[match[0]], text)

    def show(self, text: str) -> str:
        """Return the text with the tokens again."""
        return text.translate(self._tokens) if _HIDDEN.search(text) else text

    def complete(self, text: str) -> int:
        """See TokenStrings."""
        return self._strings.complete(text)


def around_tokens(text: str) -> list[str]:
    """Split a text with hidden tokens into the tokens and the stretches between them; joined they are the
    text."""
    return [part for part in _HIDDEN.split(text) if part] or [text]


def is_hidden(text: str) -> bool:
    """Return whether the text begins with a hidden token."""
    return _HIDDEN.match(text) is not None
