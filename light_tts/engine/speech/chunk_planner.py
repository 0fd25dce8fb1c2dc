"""Chunk boundaries of a streamed part.

A pure function of the prompt's length and the number of tokens, independent of timing, so that a resumed or
re-batched request is cut in the same places. Follows CosyVoice2: the first chunk is lengthened so that chunk
boundaries fall on multiples of the flow's attention chunk (prompt included), every chunk waits for
`lookahead` tokens beyond its end, and what is left when the LLM has finished is one last chunk. With
`first_hop`, which is not part of CosyVoice2, that first chunk is spoken as two, the first of which is short.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST = 5  # tokens of a chunk: more than its overlap with the next
GROWTH = 4  # growing chunks reach this many times the length of the first


def largest_hop(hop: int, grow: bool) -> int:
    """Return the `max_hop` of a ChunkPlanner with growing or fixed chunks."""
    return GROWTH * hop if grow else hop


@dataclass(frozen=True)
class Chunk:
    """Speak tokens [start, end); the flow gets tokens [0, context_end)."""

    start: int
    end: int
    context_end: int
    final: bool


class ChunkPlanner:
    """`hop`: tokens per chunk; `max_hop`: the hop doubles after each chunk up to this (equal to `hop`:
    fixed); `lookahead`: tokens that the flow's look-ahead layer needs beyond a chunk; `first_hop`: tokens of
    a shorter first chunk, from SHORTEST to `hop` - SHORTEST. It adds one boundary and moves none."""

    def __init__(
        self,
        prompt_tokens: int,
        hop: int,
        lookahead: int,
        max_hop: int | None = None,
        first_hop: int | None = None,
    ) -> None:
        self._lookahead = lookahead
        self._max_hop = max_hop or hop
        self._hop = hop
        to_border = hop + (-prompt_tokens) % hop
        self._sizes = (
            [to_border] if first_hop is None else [first_hop, to_border - first_hop]
        )  # of the next chunks
        self._finished = False
        self.offset = 0

    @property
    def needed(self) -> int:
        """Number of tokens, counted from the part's start, required for the next chunk that is not final."""
        return self.offset + self._sizes[0] + self._lookahead

    def next_chunk(self, available: int, finished: bool) -> Chunk | None:
        """Return the next chunk that can be spoken with `available` tokens, or None if it must wait or all is
        done. `finished`: no more tokens will come."""
        if self._finished:
            return None
        start = self.offset
        if available >= self.needed:
            chunk = Chunk(start, start + self._sizes[0], self.needed, False)
            del self._sizes[0]
            if not self._sizes:
                self._hop = min(self._max_hop, 2 * self._hop)
                self._sizes = [self._hop]
        elif finished:
            chunk = Chunk(start, available, available, True)
            self._finished = True
        else:
            return None
        self.offset = chunk.end
        return chunk
