"""Runners compute the steps: the interface, the plain PyTorch implementation, which runs everywhere and is
the reference for the faster one, and the choice between them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from light_tts.common import sampling
from light_tts.common.cuda_graphs import GraphCache
from light_tts.common.row_state import RowState
from light_tts.common.sampling import NO_TOKEN, SamplingRules, ban
from light_tts.engine.llm.attention import RowSpan, TorchAttention
from light_tts.engine.llm.memory import EngineMemory
from light_tts.engine.llm.options import EngineOptions
from light_tts.models.llm.joined import JoinedLM
from light_tts.models.llm.speech_lm import SpeechIds, SpeechLM

Draw = Callable[[Tensor, SamplingRules, Tensor, Tensor, Tensor, Tensor], Tensor]  # see sampling.draw


class Runner(Protocol):
    """Queues work on the device and never waits for it. The spans have slots in the table in host memory; a
    runner writes them to the device. Sampling updates the states; `next_id` becomes the unified id of the
    sampled token."""

    @property
    def graphs(self) -> GraphCache | None:
        """None if nothing is recorded."""

    def __init__(self, model: SpeechLM, memory: EngineMemory, options: EngineOptions) -> None: ...

    def warm_up(self) -> None:
        """Do in advance what would delay the first requests; `graphs` has the rest."""

    def prefill(
        self, ids: list[int], spans: list[RowSpan], complete: list[int], records: np.ndarray
    ) -> Tensor:
        """Feed the concatenated ids of the spans and sample a token after the last id of each span in
        `complete`, whose states are set to `records` before, see `state_records`. Returns (1, complete)
        int32."""

    def decode(self, spans: list[RowSpan]) -> Tensor:
        """Run as many steps as the longest span has tokens; each feeds the previous sample and samples the
        next. Returns (steps, spans) int32, NO_TOKEN where a span has ended."""


def choose_runner(device: torch.device) -> type[Runner]:
    """Return the fastest runner for the device."""
    if device.type != "cuda":
        return JoinedRunner
    try:
        from light_tts.engine.llm.triton_runner import TritonRunner
    except ImportError as error:
        logging.getLogger("light_tts.llm").warning(
            "running the LLM without Triton kernels, which is much slower: %s", error
        )
        return TorchRunner
    return TritonRunner


class TorchRunner:
    """Plain PyTorch. Attention processes one request at a time, so that the result never depends on the rest
    of the batch."""

    graphs: GraphCache | None = None

    def __init__(
        self,
        model: SpeechLM | JoinedLM,
        memory: EngineMemory,
        options: EngineOptions,
        draw: Draw = sampling.draw,
    ) -> None:
        """`draw`: replaces repetition-aware sampling, for example in tests."""
        self._model = model
        self._table = memory.table
        self._attention = TorchAttention(memory.pool, memory.table)
        self._draw = TorchDraw(draw, model.ids, memory.states)
        self._states = memory.states
        self._device = memory.states.seed.device

    def warm_up(self) -> None:
        pass

    def prefill(
        self, ids: list[int], spans: list[RowSpan], complete: list[int], records: np.ndarray
    ) -> Tensor:
        self._table.upload((span.row, span.start, span.end) for span in spans)
        hidden = self._forward(torch.tensor(ids, device=self._device), spans)
        if not complete:
            return torch.empty(1, 0, dtype=torch.int32)
        last = torch.tensor([span.length for span in spans], device=self._device).cumsum(0) - 1
        rows = torch.tensor([spans[i].row for i in complete], device=self._device)
        self._states.write(rows, torch.from_numpy(records).to(self._device))
        return self._draw(self._model.logits(hidden[last[complete]]), rows)[None]

    def decode(self, spans: list[RowSpan]) -> Tensor:
        self._table.upload((span.row, span.start, span.end) for span in spans)
        steps = max(span.length for span in spans)
        tokens = torch.full((steps, len(spans)), NO_TOKEN, dtype=torch.int32, device=self._device)
        for step in range(steps):
            active = [i for i, span in enumerate(spans) if step < span.length]
            now = [RowSpan(spans[i].row, spans[i].start + step, 1) for i in active]
            rows = torch.tensor([span.row for span in now], device=self._device)
            hidden = self._forward(self._states.next_id[rows], now)
            tokens[step, active] = self._draw(self._model.logits(hidden), rows)
        return tokens

    def _forward(self, ids: Tensor, spans: list[RowSpan]) -> Tensor:
        """Return the hidden states (tokens, hidden)."""
        places = [position for span in spans for position in range(span.start, span.end)]
        positions = torch.tensor(places, device=self._device)
        return self._model(ids, positions, self._attention(spans))


class JoinedRunner(TorchRunner):
    """The same with fused matrix products, for a CPU."""

    def __init__(self, model: SpeechLM, *arguments: Any) -> None:
        super().__init__(JoinedLM(model), *arguments)


class TorchDraw:
    """Samples tokens and updates the states."""

    def __init__(self, draw: Draw, ids: SpeechIds, states: RowState) -> None:
        self._draw = draw
        self._ids = ids
        self._states = states

    def __call__(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Sample the next tokens. scores: (rows, speech ids) float32; rows: (rows,) int64 -> (rows,) int32"""
        states = self._states
        history, steps = states.history[rows].long(), states.step[rows]
        scores = ban(scores, self._ids.speech_tokens, states.banned(rows))
        rules, seeds, parts = states.rules(rows), states.seed[rows], states.part[rows]
        drawn = self._draw(scores, rules, history, seeds, parts, steps.long())
        states.step[rows] = steps + 1
        states.next_id[rows] = (self._ids.text_vocab + drawn).to(states.next_id.dtype)
        states.history[rows] = torch.cat([history[:, 1:], drawn[:, None]], 1).to(states.history.dtype)
        return drawn.int()
