"""Simulates playback of a streamed response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Playback:
    """Result of a simulated player that starts with the first chunk and plays in real time.

    `underruns`: how often it ran out of audio. `stall`: total seconds of silence, which equals the smallest
    initial buffering that would have avoided all underruns: each wait is the part of the largest deficit so
    far that had not been waited for, so the waits add up to the largest deficit. `largest_gap`: seconds
    between two successive chunks.
    """

    underruns: int = 0
    stall: float = 0.0
    largest_gap: float = 0.0


def play(pieces: Sequence[tuple[float, float]]) -> Playback:
    """Simulate playback of `pieces`: (arrival time in seconds, seconds of audio), in order of arrival."""
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
