"""Finds given tokens in a text that may arrive in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence


class TokenStrings:
    """`tokens`: none is the beginning of another one. `pattern` matches any of them."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._begun = {token[:end] for token in tokens for end in range(1, len(token))}
        self._longest = max(map(len, self._begun), default=0)

    def complete(self, text: str) -> int:
        """Return the start of an incomplete token at the end of the text, or the end if there is none."""
        begins = range(max(0, len(text) - self._longest), len(text))
        return next((begin for begin in begins if text[begin:] in self._begun), len(text))
