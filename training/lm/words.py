"""Aligns text ids with speech: the words of the text match those of the teacher's phonemes one by one, and
the teacher's durations say when each phoneme is spoken."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from training.corpus.corpus import heard_at

TOKEN_RATE = 25  # speech tokens per second
NEAR = 0.5  # tokens; a word also counts as spoken this far around its tokens
_WORD = re.compile(r"\S+")


def ids_of_words(text: str, offsets: Sequence[tuple[int, int]], words: str | None = None) -> np.ndarray:
    """offsets: of each text id, the characters that it stands for; words: the text with a blank behind each
    word, where it has none itself -> (words + 1,): where the ids of each word (what has no blank in it)
    begin, and where those of the last one end."""
    if words is None:
        ends = np.array([match.end() for match in _WORD.finditer(text)])
    else:
        ends = np.cumsum([len(word) for word in words.split()])
    last = np.array([end - 1 for _, end in offsets])
    word = np.searchsorted(ends, last, side="right").clip(max=len(ends) - 1)  # of each id
    return np.searchsorted(word, np.arange(len(ends) + 1))


def words_of_phonemes(phonemes: str) -> tuple[np.ndarray, int]:
    """-> (phonemes, 2): the first word of each phoneme and the one behind its last, where a blank belongs to
    those on both sides; and how many words there are."""
    blank = np.array([phoneme == " " for phoneme in phonemes], np.int64)
    word = np.cumsum(blank)
    return np.stack([word - blank, word + 1], 1), int(blank.sum()) + 1


def spoken_words(phonemes: str, ids_of: np.ndarray) -> np.ndarray | None:
    """`ids_of`: as `ids_of_words` gives it -> (phonemes, 2): which text ids each belongs to, the first and
    the one behind the last; None where the text has not as many words as the phonemes."""
    words, count = words_of_phonemes(phonemes)
    return ids_of[words] if count == len(ids_of) - 1 else None


def words_at(words: np.ndarray, durations: np.ndarray, tokens: int) -> np.ndarray:
    """words: (phonemes, 2) as `spoken_words` gives them; durations: (phonemes,) in seconds -> (tokens, 2):
    the text ids of all that is heard during each speech token, or NEAR to it."""
    begin = np.arange(tokens)
    first = heard_at((begin - NEAR) / TOKEN_RATE, durations)
    last = heard_at((begin + 1 + NEAR) / TOKEN_RATE, durations)
    return np.stack([words[first, 0], words[last, 1]], 1)
