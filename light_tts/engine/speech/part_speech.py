"""The tokens of one part as they arrive, and the chunks that can be spoken of them. Pure: no tensors, no
messages.

A part whose beginning the client has got already (`Delivered`) leaves out the chunks it has, but for the
last ones, which are spoken again without being sent: what they leave to the next chunk is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from light_tts.engine.speech.chunk_planner import Chunk, ChunkPlanner


class PartTooLong(Exception):
    """Prompt and speech together are more than the flow can take; the message names the limit."""


@dataclass(frozen=True)
class ChunkRules:
    """How parts are cut and measured. `hop`, `max_hop`, `lookahead`: see ChunkPlanner; `vocabulary`: ids from
    here on are never spoken (bistream's fill id); `max_tokens`: of prompt and speech; `samples_per_token`;
    `held_back`: samples at a chunk's end that come with the next one; `replayed`: chunks to speak again in
    order to go on after them."""

    hop: int
    max_hop: int
    lookahead: int
    vocabulary: int
    max_tokens: int
    samples_per_token: int
    held_back: int
    replayed: int


@dataclass(frozen=True)
class Delivered:
    """What the client has got of a part: the LLM outputs its audio was made from, and how many samples."""

    tokens: Sequence[int] = ()
    samples: int = 0


@dataclass(frozen=True)
class Step:
    """Speak `chunk`. `tokens`: the LLM outputs that go to the client with it; `start`: index in the part of
    the first sample; `skip`: how many of its samples the client has, None: all (nothing is sent)."""

    chunk: Chunk
    tokens: list[int]
    start: int
    skip: int | None


class PartSpeech:
    """`step` is the chunk that can be spoken next, None: wait for tokens, or all is done; `advance` when it
    has been spoken."""

    def __init__(
        self, rules: ChunkRules, prompt_tokens: int, stream: bool, delivered: Delivered | None = None
    ) -> None:
        self.ids: list[int] = []  # what the flow is given
        self.step: Step | None = None
        self.done = False
        self.prompt_tokens = prompt_tokens
        self.stream = stream
        self._rules = rules
        self._outputs: list[int] = []  # what the LLM sent: fill ids as well
        self._position: list[int] = []  # of each of `ids` in `_outputs`
        self._finished = False
        self._delivered = delivered or Delivered()
        self._sent_outputs = len(self._delivered.tokens)
        self._chunk_count = 0
        self._delivered_chunks = self._count_delivered() if stream else 0
        self._planner = self._new_planner()

    def add(self, tokens: Sequence[int], final: bool) -> None:
        """Tokens arrived, the last ones if `final`. Raises PartTooLong."""
        for token in tokens:
            if 0 <= token < self._rules.vocabulary:
                self._position.append(len(self._outputs))
                self.ids.append(token)
            self._outputs.append(token)
        if self.prompt_tokens + len(self.ids) > self._rules.max_tokens:
            raise PartTooLong(
                f"one part of the text with its prompt ({self.prompt_tokens} tokens) became longer than the "
                f"limit of {self._rules.max_tokens} speech tokens"
            )
        self._finished |= final
        self._plan()

    def advance(self) -> None:
        """The present step has been spoken (and sent)."""
        if self.step is not None:
            self._sent_outputs = max(self._sent_outputs, self._outputs_until(self.step.chunk))
            self.done = self.step.chunk.final
            self.step = None
            self._plan()

    def _plan(self) -> None:
        while self.step is None and not self.done:
            chunk = self._next_chunk()
            if chunk is None:
                return
            number, self._chunk_count = self._chunk_count, self._chunk_count + 1
            if number >= self._delivered_chunks - self._rules.replayed:
                self.step = self._step(chunk, replay=number < self._delivered_chunks)

    def _next_chunk(self) -> Chunk | None:
        if self.stream:
            return self._planner.next_chunk(len(self.ids), self._finished)
        return Chunk(0, len(self.ids), len(self.ids), True) if self._finished else None

    def _step(self, chunk: Chunk, replay: bool) -> Step:
        start = max(0, chunk.start * self._rules.samples_per_token - self._rules.held_back)
        if replay:
            return Step(chunk, [], start, None)
        skip = max(0, self._delivered.samples - start)
        tokens = self._outputs[self._sent_outputs : self._outputs_until(chunk)]
        return Step(chunk, tokens, start + skip, skip)

    def _outputs_until(self, chunk: Chunk) -> int:
        """How many LLM outputs belong to the chunks up to this one: fill ids go with the token after them."""
        if chunk.final:
            return len(self._outputs)
        return self._position[chunk.end - 1] + 1

    def _count_delivered(self) -> int:
        """How many whole chunks the client has. The last chunk is never among them: its part is finished."""
        planner, count = self._new_planner(), 0
        while True:
            chunk = planner.next_chunk(sys.maxsize, finished=False)
            assert chunk is not None  # there is no end of tokens
            if chunk.end * self._rules.samples_per_token - self._rules.held_back > self._delivered.samples:
                return count
            count += 1

    def _new_planner(self) -> ChunkPlanner:
        rules = self._rules
        return ChunkPlanner(self.prompt_tokens, rules.hop, rules.lookahead, rules.max_hop)
