"""The LLM stage's interface to a model besides token generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

Positions = Sequence[int]  # in the inputs of a part


class Aligner(Protocol):
    """Determines which word is being spoken."""

    def __call__(self, inputs: list[int], text: Positions, speech: Positions, words: list[int]) -> np.ndarray:
        """inputs: unified ids of a part; text, speech: positions of its words and its speech tokens; words:
        number of ids of each word -> (speech tokens, words) float32: share of each token's attention that
        goes to each word, 0 to 1."""
