"""Detects skipped and repeated words of a part from the attention with which its tokens were drawn."""

from __future__ import annotations

from typing import Literal

import numpy as np

Misreading = Literal["skipped", "repeated"]

# Thresholds for light-tts-mini, see docs/quality.md.
SPOKEN = 0.1  # a word is spoken if some token gives it at least this share of its attention
HELD = 2  # a word is reached when so many tokens in a row belong to it,
AHEAD = 2  # if it is at most so many words after the furthest word reached
RUN = 3  # words are repeated if so many tokens in a row (120 ms) belong to words before the furthest one,
FAR = 2  # so many of them
BEHIND = 2  # to words that are at least so many words before it


def misreading(share: np.ndarray) -> Misreading | None:
    """share: (tokens, words), share of each token's attention that goes to each word -> "skipped" if a word
    was left out, "repeated" if the speech went back to earlier words, otherwise None."""
    tokens, words = share.shape
    if not tokens or not words:
        return None
    if share.max(0).min() < SPOKEN:
        return "skipped"
    furthest = held = before_it = behind = 0
    before = -1
    for word in share.argmax(1).tolist():
        held = held + 1 if word == before else 1
        before = word
        if held >= HELD and furthest < word <= furthest + AHEAD:
            furthest = word
        before_it = before_it + 1 if word < furthest else 0
        behind = behind + (word <= furthest - BEHIND) if before_it else 0
        if before_it >= RUN and behind >= FAR:
            return "repeated"
    return None
