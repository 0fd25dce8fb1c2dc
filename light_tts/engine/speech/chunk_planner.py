"""Where the chunks of a streamed part begin and end.

A pure function of the prompt's length and the number of tokens, never of timing, so that a resumed or
re-batched request is cut in the same places. The rule is CosyVoice2's: the first chunk is lengthened so that
chunk borders fall on multiples of the flow's attention chunk (prompt included), every chunk waits for
`lookahead` tokens beyond its end, and what is left when the LLM has finished is one last chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

GROWTH = 4  # growing chunks become up to so many times the first


def largest_hop(hop: int, grow: bool) -> int:
    """`max_hop` of a ChunkPlanner whose chunks grow, or do not."""
    return GROWTH * hop if grow else hop


@dataclass(frozen=True)
class Chunk:
    """Speak tokens [start, end); the flow is given tokens [0, context_end)."""

    start: int
    end: int
    context_end: int
    final: bool


class ChunkPlanner:
    """`hop`: tokens a chunk; `max_hop`: the hop doubles after each chunk up to this (equal to `hop`: fixed);
    `lookahead`: tokens the flow's look-ahead layer needs beyond a chunk."""

    def __init__(self, prompt_tokens: int, hop: int, lookahead: int, max_hop: int | None = None) -> None:
        self._lookahead = lookahead
        self._max_hop = max_hop or hop
        self._hop = hop
        self._pad = (-prompt_tokens) % hop  # lengthens the first chunk
        self._finished = False
        self.offset = 0

    @property
    def needed(self) -> int:
        """How many tokens (counted from the part's start) the next chunk that is not final waits for."""
        return self.offset + self._hop + self._pad + self._lookahead

    def next_chunk(self, available: int, finished: bool) -> Chunk | None:
        """The next chunk that can be spoken with `available` tokens; None: wait for more, or all is done.
        `finished`: no more tokens will come."""
        if self._finished:
            return None
        start = self.offset
        if available >= self.needed:
            chunk = Chunk(start, start + self._hop + self._pad, self.needed, False)
            self._pad = 0
            self._hop = min(self._max_hop, 2 * self._hop)
        elif finished:
            chunk = Chunk(start, available, available, True)
            self._finished = True
        else:
            return None
        self.offset = chunk.end
        return chunk
