"""Runs one step of the language model: forward over the planned tokens, one draw for each request that has
all its ids in the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from light_tts.common.kv_pool import KVPool, SlotTable
from light_tts.common.sampling import NO_TOKEN, ban
from light_tts.models.cosyvoice2.llm import SpeechLM
from light_tts.server.tts_llm.attention import AttentionBackend, Span, TorchAttention
from light_tts.server.tts_llm.sequence import Sequence

Sampler = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # see RepetitionAwareSampler.__call__
Work = list[tuple[Sequence, int]]


class Engine:
    """`slots`: size of the KV pool in tokens; `rows`: most requests in it; `max_len`: most tokens of one."""

    def __init__(
        self, model: SpeechLM, sampler: Sampler, window: int, slots: int, rows: int, max_len: int, int8: bool
    ) -> None:
        weight = model.embedding.weight
        self._model = model
        self._sampler = sampler
        self._window = window
        self._device = weight.device
        backbone = model.backbone
        self._table = SlotTable(slots, rows, max_len, self._device)
        pool = KVPool(
            backbone.num_hidden_layers,
            slots,
            backbone.num_key_value_heads,
            backbone.head_dim,
            weight.dtype,
            self._device,
            int8,
        )
        self._attention: AttentionBackend = TorchAttention(pool, self._table)

    @torch.inference_mode()
    def run(self, work: Work) -> list[tuple[Sequence, int]]:
        """One step. -> the token drawn for each sequence that has no more pending ids; `accept` is the
        caller's. After an exception the sequences are as before."""
        try:
            spans = [self._extend(sequence, tokens) for sequence, tokens in work]
            hidden = self._forward(work, spans)
            complete = [i for i, (sequence, tokens) in enumerate(work) if tokens == sequence.pending]
            sequences = [work[i][0] for i in complete]
            drawn = self._draw(hidden[complete], sequences) if sequences else []
        except BaseException:
            for sequence, _ in work:
                if sequence.row is not None:
                    self._table.truncate(sequence.row, sequence.cached)
            raise
        for sequence, tokens in work:
            sequence.cached += tokens
        return list(zip(sequences, drawn, strict=True))

    def release(self, sequence: Sequence) -> None:
        """Give back all slots of the sequence; it may go on later by a new prefill."""
        if sequence.row is not None:
            self._table.close(sequence.row)
            sequence.row = None
        sequence.cached = 0

    def check_device(self) -> None:
        """Raises when the device no longer works, so that only a new process can go on."""
        torch.zeros(1, device=self._device).item()

    def _extend(self, sequence: Sequence, tokens: int) -> Span:
        if sequence.row is None:
            sequence.row = self._table.open()
        self._table.extend(sequence.row, tokens)
        return Span(sequence.row, sequence.cached, tokens)

    def _forward(self, work: Work, spans: list[Span]) -> Tensor:
        """-> (requests, hidden): the last row of each."""
        ids = [i for s, n in work for i in s.inputs[s.cached : s.cached + n]]
        positions = [position for span in spans for position in range(span.start, span.end)]
        input_ids, positions = torch.tensor([ids, positions], device=self._device)
        decode = all(span.length == 1 for span in spans)
        attention = self._attention.decode(spans) if decode else self._attention.prefill(spans)
        hidden = self._model(input_ids, positions, attention)
        last = torch.tensor([span.length for span in spans], device=self._device).cumsum(0) - 1
        return hidden[last]

    def _draw(self, hidden: Tensor, sequences: list[Sequence]) -> list[int]:
        """hidden: (requests, hidden)"""
        banned = torch.tensor([s.banned for s in sequences], device=self._device)
        scores = ban(self._model.logits(hidden), self._model.ids.speech_tokens, banned)
        history = [s.latest(self._window) for s in sequences]
        history = [[NO_TOKEN] * (self._window - len(latest)) + latest for latest in history]
        state = [[s.seed, s.part, len(s.outputs)] for s in sequences]
        history, state = (torch.tensor(rows, device=self._device) for rows in (history, state))
        return self._sampler(scores, history, *state.T).tolist()
