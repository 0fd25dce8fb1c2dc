"""Skipped and repeated words are detected from the attention."""

from __future__ import annotations

import numpy as np
import pytest

from light_tts.models.llm.misreading import misreading


def attention(path: list[int], words: int) -> np.ndarray:
    share = np.full((len(path), words), 0.02)
    share[np.arange(len(path)), path] = 0.9
    return share


@pytest.mark.parametrize(
    ("path", "words", "found"),
    [
        ([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4], 5, None),
        ([0, 0, 0, 1, 1, 3, 3, 3], 4, "skipped"),
        ([0, 0, 1, 1], 4, "skipped"),  # it ended too early
        ([0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 0, 1, 1, 2, 2, 3, 3], 4, "repeated"),
        ([0, 0, 1, 1, 2, 2, 3, 3, 1, 1, 1, 2, 3], 4, "repeated"),
        ([0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 3, 3], 4, "repeated"),
        ([0, 0, 1, 1, 2, 2, 1, 1, 1, 2, 3], 4, None),  # on the border of two words
        ([0, 0, 1, 1, 2, 2, 3, 0, 3, 1, 3, 3], 4, None),  # glances back
        ([0, 0, 3, 0, 0, 0, 1, 1, 2, 2, 3, 3], 4, None),  # and ahead
        ([0, 0, 3, 3, 0, 0, 0, 1, 1, 2, 2, 3, 3], 4, None),
        ([0], 1, None),
        ([], 2, None),
    ],
)
def test_ways_through_a_text(path, words, found):
    assert misreading(attention(path, words)) == found


def test_a_word_that_shares_its_token():
    share = attention([0, 0, 1, 2, 2], 4)
    assert misreading(share) == "skipped"
    share[3, 3] = 0.4
    assert misreading(share) is None
