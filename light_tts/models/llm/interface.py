"""What the LLM stage asks of a model besides tokens."""

from __future__ import annotations

from typing import Protocol


class Aligner(Protocol):
    """Says when words are spoken."""

    def __call__(self, inputs: list[int], text: range, speech: range, words: list[int]) -> list[int]:
        """inputs: unified ids of a part; text, speech: where its words and its speech tokens are; words: how
        many ids each has -> (2 * words,): of each word the speech token with which it begins, and the one
        behind its last."""
