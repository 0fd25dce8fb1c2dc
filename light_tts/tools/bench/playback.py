"""How a streamed answer would have sounded to somebody listening while it came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Playback:
    """What a player met that starts with the first piece and plays in real time.

    `underruns`: how often it ran dry before the end. `stall`: seconds of silence in all; this is also the
    smallest start-up buffer, in seconds between the first piece and the start of the player, that would have
    avoided every underrun: each wait is the part of the largest deficit so far that was not waited for yet,
    so the waits add up to the largest deficit. `largest_gap`: seconds between two successive pieces."""

    underruns: int = 0
    stall: float = 0.0
    largest_gap: float = 0.0


def play(pieces: Sequence[tuple[float, float]]) -> Playback:
    """Playback of `pieces`: (seconds at which it arrived, seconds of audio in it), in order of arrival."""
    if not pieces:
        return Playback()
    underruns, stall = 0, 0.0
    dry = pieces[0][0]
    for arrival, audio in pieces:
        if arrival > dry:
            underruns += 1
            stall += arrival - dry
            dry = arrival
        dry += audio
    arrivals = [arrival for arrival, _ in pieces]
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    return Playback(underruns, stall, max(gaps, default=0.0))
