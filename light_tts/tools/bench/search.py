"""Searches for the highest rate that a server keeps up with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from light_tts.tools.bench.client import Outcome


@dataclass(frozen=True)
class Goal:
    """Criterion for keeping up: the P95 of the time to first audio is at most `first_audio` seconds, no
    player runs out of audio, and nothing fails."""

    first_audio: float

    def shortfall(self, point: dict[str, Any]) -> str:
        """Return in words where the figures of a run miss the goal, or an empty string."""
        found = []
        if not point["requests"]:
            found.append("no request")
        if failed := sum(point["errors"].values()):
            found.append(f"{failed} failed")
        if point["underrun_requests"]:
            found.append(f"{point['underrun_requests']} ran dry")
        p95 = point["first_audio"].get("p95", 0.0)
        if p95 > self.first_audio:
            found.append(f"first audio P95 {p95:.3f} s")
        return ", ".join(found)

    def is_hopeless(self, outcomes: list[Outcome], planned: int) -> bool:
        """Return whether `planned` requests, given those that are complete, can no longer meet the goal."""
        late = 0
        for outcome in outcomes:
            if outcome.error or outcome.playback.underruns:
                return True
            late += outcome.first_audio > self.first_audio
        # The P95 is between the sorted values number 0.95 (planned - 1) and the next one.
        return late > 0.05 * (planned - 1) + 1


async def find_highest(
    probe: Callable[[float], Awaitable[bool]], first: float, precision: float, lowest: float
) -> float:
    """Return the highest rate that `probe` accepts, to within the fraction `precision`: doubled from `first`
    until one fails (or halved until one passes), then bisected. Returns 0.0 if no rate from `lowest` on
    passes."""
    low, high = 0.0, first
    if await probe(first):
        low, high = first, 2 * first
        while await probe(high):
            low, high = high, 2 * high
    else:
        low = high / 2
        while low >= lowest and not await probe(low):
            low, high = low / 2, low
        if low < lowest:
            return 0.0
    while high - low > precision * low:
        middle = (low + high) / 2
        if await probe(middle):
            low = middle
        else:
            high = middle
    return low
