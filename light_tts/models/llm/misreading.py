"""Detects skipped and repeated words of a part from the attention with which its tokens were drawn."""

from __future__ import annotations

from typing import Literal

import numpy as np

Misreading = Literal["skipped", "repeated"]

# Thresholds for light-tts-mini, see docs/quality.md.
SPOKEN = 0.1  # minimum attention share from some token for a word to count as spoken
HELD = 2  # number of consecutive tokens that must belong to a word for it to count as reached,
AHEAD = 2  # if it is at most this many words after the furthest word reached
RUN = 3  # number of consecutive tokens (120 ms) before the furthest word that count as a repetition,
FAR = 2  # at least this many of which
BEHIND = 2  # are at least this many words before it


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
