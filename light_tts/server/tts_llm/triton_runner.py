"""Steps on a GPU: Triton kernels, and a decode step as one CUDA graph for each size of batch."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import torch
from torch import Tensor

from light_tts.common.cuda_graphs import GraphCache
from light_tts.common.kv_pool import KVPool, SlotTable
from light_tts.common.row_state import RowState
from light_tts.common.sampling import RepetitionAwareSampler
from light_tts.common.transfer import upload
from light_tts.kernels.decode_attention import decode_attention
from light_tts.kernels.prefill_attention import prefill_attention, prefill_blocks
from light_tts.kernels.row_state import advance
from light_tts.kernels.sampling import sample
from light_tts.models.cosyvoice2.fused_llm import FusedLM, LayerPool
from light_tts.models.cosyvoice2.llm import SpeechLM
from light_tts.server.tts_llm.attention import Span
from light_tts.server.tts_llm.options import EngineOptions

_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # then in steps of 64
_SHORTEST = 512  # bucket of lengths; the others are twice as long each


class TritonRunner:
    """See `Runner`. A batch is filled up with rows of -1, which change nothing, to the size of a graph.

    A decode step finds its rows in `_schedule` and leaves its tokens in `_tokens`, both (steps, batch), where
    `_step` says: so the same graph serves every step of a round, and a sequence that takes part in fewer
    steps than others is -1 in the rest."""

    def __init__(
        self,
        model: SpeechLM,
        sampler: RepetitionAwareSampler,
        pool: KVPool,
        table: SlotTable,
        states: RowState,
        options: EngineOptions,
    ) -> None:
        self._device = device = states.seed.device
        self._lm = FusedLM(model, pool, options.max_len)
        self._slots_of = table.slots_of
        self._table = table.device_slots
        self._states = states
        self._draw = partial(
            sample,
            text_vocab=model.ids.text_vocab,
            speech_tokens=model.ids.speech_tokens,
            top_p=sampler.top_p,
            top_k=sampler.top_k,
            win_size=sampler.win_size,
            tau_r=sampler.tau_r,
            greedy=sampler.top_k == 1 and sampler.tau_r > 1,
        )
        self._options = options
        self._graph_len = min(options.max_len, options.graph_max_len)
        self._graphs = GraphCache(device, options.graph_max_batch > 0)
        self._most_steps = max(options.round_steps, GraphCache.WARM_UP_RUNS)
        room = self._most_steps * self._batch_bucket(options.rows)
        self._schedule = torch.full((room,), -1, dtype=torch.int32, device=device)
        self._tokens = torch.empty_like(self._schedule)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)

    def warm_up(self) -> None:
        if not self._graphs.enabled:
            return
        largest = min(self._options.rows, self._options.graph_max_batch)
        batches = sorted({self._batch_bucket(n) for n in range(1, largest + 1)})
        lengths = sorted({self._length_bucket(n) for n in range(1, self._graph_len + 1)})
        logging.getLogger(__name__).info(
            "recording CUDA graphs of decode steps: batches %s, lengths %s", batches, lengths
        )
        for length in lengths:
            for batch in batches[::-1]:  # the largest first, whose memory the others use again
                self._record(batch, length)

    def prefill(self, ids: list[int], spans: list[Span], complete: list[int]) -> Tensor:
        lengths = [span.length for span in spans]
        offsets = np.cumsum([0, *lengths])
        ids, positions, slots, *where, blocks, last, rows = self._upload(
            ids,
            np.concatenate([np.arange(span.start, span.end) for span in spans]),
            np.concatenate([self._slots_of(span.row)[span.start : span.end] for span in spans]),
            [span.row for span in spans],
            [span.start for span in spans],
            lengths,
            offsets[:-1],
            np.array(prefill_blocks(lengths)).ravel(),
            [offsets[i + 1] - 1 for i in complete] or [0],
            [spans[i].row for i in complete],
        )

        def attend(q: Tensor, pool: LayerPool) -> Tensor:
            return prefill_attention(q, *pool, self._table, *where, blocks.view(-1, 2))

        logits = self._lm(ids, positions, slots, attend, last)
        tokens = torch.empty_like(rows)
        if complete:
            self._draw(logits, self._states, rows, tokens)
        return tokens[None]

    def decode(self, spans: list[Span]) -> Tensor:
        steps = max(span.length for span in spans)
        batch, length = self._batch_bucket(len(spans)), self._length_bucket(max(span.end for span in spans))
        recorded = batch <= self._options.graph_max_batch and length <= self._graph_len
        if recorded and self._graphs.enabled and (batch, length) not in self._graphs:
            self._record(batch, length)
        rows = np.array([span.row for span in spans], np.int32)
        takes_part = np.arange(steps)[:, None] < [span.length for span in spans]
        schedule = np.full((steps, batch), -1, np.int32)
        schedule[:, : len(spans)] = np.where(takes_part, rows, -1)
        self._schedule[: schedule.size].copy_(upload(schedule.ravel(), self._device))
        self._step.zero_()
        step = partial(self._decode_step, batch, length)
        for _ in range(steps):
            if recorded:
                self._graphs.run((batch, length), step)
            else:
                step()
        return self._tokens[: schedule.size].view(steps, batch)[:, : len(spans)]

    def _decode_step(self, batch: int, length: int) -> None:
        room = self._most_steps * batch
        schedule, tokens = (x[:room].view(-1, batch) for x in (self._schedule, self._tokens))
        rows = schedule.index_select(0, self._step)[0]
        ids, positions, slots, lengths = advance(self._states, self._table, rows)

        def attend(q: Tensor, pool: LayerPool) -> Tensor:
            return decode_attention(q, *pool, self._table, rows, lengths, length)

        logits = self._lm(ids, positions, slots, attend)
        drawn = torch.empty_like(rows)
        self._draw(logits, self._states, rows, drawn)
        tokens.index_copy_(0, self._step, drawn[None])
        self._step += 1

    def _record(self, batch: int, length: int) -> None:
        self._schedule.fill_(-1)
        self._step.zero_()

        def step() -> None:
            self._decode_step(batch, length)

        self._graphs.record((batch, length), step)

    def _upload(self, *parts: list[int] | np.ndarray) -> list[Tensor]:
        """Lists of int32, in one copy. Each begins where 16 bytes do: kernels are compiled for that."""
        ends = np.cumsum([-(-len(part) // 4) * 4 for part in parts])
        flat = np.zeros(ends[-1], np.int32)
        starts = [0, *ends[:-1]]
        for start, part in zip(starts, parts, strict=True):
            flat[start : start + len(part)] = part
        flat = upload(flat, self._device)
        return [flat[start : start + len(part)] for start, part in zip(starts, parts, strict=True)]

    def _batch_bucket(self, batch: int) -> int:
        """The smallest size that holds `batch` rows, of those that are recorded."""
        bucket = next((size for size in _BATCHES if size >= batch), -(-batch // 64) * 64)
        most = self._options.graph_max_batch
        return min(bucket, most) if batch <= most else bucket

    def _length_bucket(self, length: int) -> int:
        """The smallest bound of lengths, of those that are recorded; beyond them there is one."""
        if length > self._graph_len:
            return self._options.max_len
        bucket = _SHORTEST
        while bucket < length:
            bucket *= 2
        return min(bucket, self._graph_len)
