"""Whether a part says its text once from its beginning to its end, by the attention it was spoken with."""

from __future__ import annotations

from typing import Literal

import numpy as np

Misreading = Literal["skipped", "repeated"]

SPOKEN = 0.3  # largest share of the attention that every word which is spoken has at some token
HELD = 2  # tokens in a row that a word needs to have been reached
AHEAD = 2  # words from the furthest one to the next that is reached: what is further is a glance
RUN = 3  # tokens in a row (120 ms) that belong to words before the furthest one: more than a glance back
BEHIND = 2  # words before the furthest one that some of these must be: its neighbour alone repeats nothing
FAR = 2  # how many of them


def misreading(share: np.ndarray) -> Misreading | None:
    """share: (tokens, words), how much of each token's attention each word has -> "skipped": some word was
    left out; "repeated": the speech went back to words said before; None: neither."""
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
