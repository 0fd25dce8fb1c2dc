"""The LLM stage's interface to a model besides token generation."""

from __future__ import annotations

from typing import Protocol


class Aligner(Protocol):
    """Determines when words are spoken."""

    def __call__(self, inputs: list[int], text: range, speech: range, words: list[int]) -> list[int]:
        """inputs: unified ids of a part; text, speech: ranges of its words and its speech tokens; words:
        number of ids of each word -> (2 * words,): for each word its first speech token and the one after its
        last."""
