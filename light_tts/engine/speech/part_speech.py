"""Collects the tokens of one part and determines the chunks that can be spoken. Pure: no tensors or messages.

Of a part that the client has partly received (`Delivered`), the chunks already received are skipped, except
those that are spoken again without being sent because the next chunk needs their state.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from light_tts.engine.speech.chunk_planner import Chunk, ChunkPlanner


class PartTooLong(Exception):
    """Prompt and speech together exceed the limit of the flow; the message names the limit."""


@dataclass(frozen=True)
class ChunkRules:
    """How parts are cut and measured. `hop`, `max_hop`, `lookahead`, `first_hop`: see ChunkPlanner;
    `vocabulary`: ids from here on are never spoken (bistream's fill id); `max_tokens`: of prompt and speech;
    `held_back`: samples at the end of a chunk that are sent with the next one; `replayed`: number of chunks
    to speak again in order to continue after them, None: all chunks of the part."""

    hop: int
    max_hop: int
    lookahead: int
    vocabulary: int
    max_tokens: int
    samples_per_token: int
    held_back: int
    replayed: int | None
    first_hop: int | None = None


@dataclass(frozen=True)
class Delivered:
    """The audio of a part that the client has received: the LLM outputs it was made from, and the
    number of samples."""

    tokens: Sequence[int] = ()
    samples: int = 0


@dataclass(frozen=True)
class SpeechStep:
    """Speak `chunk`. `tokens`: the LLM outputs reported to the client with it; `start`: index of the first
    sample within the part; `skip`: number of its samples that the client already has, None: all of them
    (nothing is sent)."""

    chunk: Chunk
    tokens: list[int]
    start: int
    skip: int | None


class PartSpeech:
    """The progress of one part. `step` is the chunk to speak next, or None if it waits for tokens or all is
    done; call `advance` when it has been spoken."""

    def __init__(
        self, rules: ChunkRules, prompt_tokens: int, stream: bool, delivered: Delivered | None = None
    ) -> None:
        self.ids: list[int] = []  # input of the flow
        self.step: SpeechStep | None = None
        self.done = False
        self.prompt_tokens = prompt_tokens
        self.stream = stream
        self._rules = rules
        self._outputs: list[int] = []  # output of the LLM, including fill ids
        self._position: list[int] = []  # index in `_outputs` of each of `ids`
        self._finished = False
        self._delivered = delivered or Delivered()
        self._sent_outputs = len(self._delivered.tokens)
        self._chunk_count = 0
        self._delivered_chunks = self._count_delivered() if stream else 0
        self._first_spoken = 0 if rules.replayed is None else self._delivered_chunks - rules.replayed
        self._planner = self._new_planner()

    def add(self, tokens: Sequence[int], final: bool) -> None:
        """Add tokens, the last ones if `final`. Raises PartTooLong."""
        for token in tokens:
            if 0 <= token < self._rules.vocabulary:
                self._position.append(len(self._outputs))
                self.ids.append(token)
            self._outputs.append(token)
        if self.prompt_tokens + len(self.ids) > self._rules.max_tokens:
            raise PartTooLong(
                f"one part of the text with its prompt ({self.prompt_tokens} tokens) exceeds the limit "
                f"of {self._rules.max_tokens} speech tokens"
            )
        self._finished |= final
        self._plan()

    def advance(self) -> None:
        """The current step has been spoken and sent."""
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
            if number >= self._first_spoken:
                self.step = self._step(chunk, replay=number < self._delivered_chunks)

    def _next_chunk(self) -> Chunk | None:
        if self.stream:
            return self._planner.next_chunk(len(self.ids), self._finished)
        return Chunk(0, len(self.ids), len(self.ids), True) if self._finished else None

    def _step(self, chunk: Chunk, replay: bool) -> SpeechStep:
        start = max(0, chunk.start * self._rules.samples_per_token - self._rules.held_back)
        if replay:
            return SpeechStep(chunk, [], start, None)
        skip = max(0, self._delivered.samples - start)
        tokens = self._outputs[self._sent_outputs : self._outputs_until(chunk)]
        return SpeechStep(chunk, tokens, start + skip, skip)

    def _outputs_until(self, chunk: Chunk) -> int:
        """Return the number of LLM outputs in the chunks up to this one; fill ids belong to the token after
        them."""
        if chunk.final:
            return len(self._outputs)
        return self._position[chunk.end - 1] + 1

    def _count_delivered(self) -> int:
        """Return the number of whole chunks that the client has. The last chunk is never counted, since its
        part would be finished."""
        planner, count = self._new_planner(), 0
        while True:
            chunk = planner.next_chunk(sys.maxsize, finished=False)
            assert chunk is not None  # the tokens are unlimited
            if chunk.end * self._rules.samples_per_token - self._rules.held_back > self._delivered.samples:
                return count
            count += 1

    def _new_planner(self) -> ChunkPlanner:
        rules = self._rules
        return ChunkPlanner(self.prompt_tokens, rules.hop, rules.lookahead, rules.max_hop, rules.first_hop)
