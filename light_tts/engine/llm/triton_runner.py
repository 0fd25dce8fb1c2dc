"""LLM steps on a GPU: Triton kernels, with one CUDA graph per size for a decode step or a short prefill."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from light_tts.common.cuda_graphs import GraphCache, SizedWork
from light_tts.common.transfer import pinned, upload
from light_tts.engine.llm.attention import RowSpan
from light_tts.engine.llm.memory import EngineMemory
from light_tts.engine.llm.options import PREFILL_REQUESTS, PREFILL_TOKENS, EngineOptions
from light_tts.engine.llm.prefill_batch import PrefillShape
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.llm.decode_attention import decode_attention
from light_tts.kernels.llm.prefill_attention import prefill_attention
from light_tts.kernels.llm.rotary import rotary_kv_write
from light_tts.kernels.llm.row_state import advance, write_rows
from light_tts.kernels.llm.sampling import sample
from light_tts.kernels.llm.slot_table import write_slots
from light_tts.models.llm.fused import FusedLM, LayerPool
from light_tts.models.llm.speech_lm import SpeechLM

_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # further sizes are multiples of 64
_SHORTEST = 512  # smallest length bucket; each further one is twice as long
_PREFILL_TOKENS = (
    16,
    32,
    64,
    128,
    192,
    256,
    320,
    384,
    512,
    640,
    768,
    896,
    1024,
    1280,
    1536,
    PREFILL_TOKENS,
)
_PREFILL_SPANS = (1, 4, PREFILL_REQUESTS)
_FIRST_PREFILL = 512  # tokens; single prefills up to this size are recorded before the first request


class TritonRunner:
    """The GPU implementation of `Runner`. A batch is padded to the size of a graph with rows of -1, which
    have no effect.

    A decode step reads its rows from `_schedule` and writes its tokens to `_tokens`, both (steps, batch), at
    the step given by `_steps`, (batch,). So the same graph serves every step of a round, and a sequence that
    takes part in fewer steps than others is -1 in the rest.
    """

    def __init__(self, model: SpeechLM, memory: EngineMemory, options: EngineOptions) -> None:
        self._states = memory.states
        self._device = device = memory.states.seed.device
        self._lm = FusedLM(model, memory.pool, options.max_len)
        self._slots = memory.table
        self._table = memory.table.device_slots
        self._draw = partial(
            sample,
            text_vocab=model.ids.text_vocab,
            speech_tokens=model.ids.speech_tokens,
            max_top_k=options.max_top_k,
        )
        self._options = options
        self._graph_len = min(options.max_len, options.graph_max_len)
        self.graphs = GraphCache(device, options.graph_max_batch > 0)
        self._most_steps = options.round_steps
        widest = self._batch_bucket(options.rows)
        room = self._most_steps * widest
        self._schedule = torch.full((room,), -1, dtype=torch.int32, device=device)
        self._tokens = torch.empty_like(self._schedule)
        self._steps = torch.zeros(widest, dtype=torch.int64, device=device)

    def warm_up(self) -> None:
        """Compile all kernels. Record what a few requests at once need; the rest is left to
        `graphs.record_next`, small batches and short requests first."""
        graphs = self.graphs.enabled
        largest = min(self._options.rows, self._options.graph_max_batch) if graphs else self._options.rows
        batches = sorted({self._batch_bucket(n) for n in range(1, largest + 1)})
        lengths = sorted({self._length_bucket(n) for n in range(1, self._graph_len + 1)})
        prefills = [self._prefill_shape(n, spans) for spans in _PREFILL_SPANS for n in _PREFILL_TOKENS]
        steps = [(batch, length) for length in lengths for batch in batches]

        def rehearse() -> None:
            for shape in prefills:
                self._prefill_step(shape, upload(shape.empty(), self._device))
            for batch, length in steps:
                self._decode_step(batch, length)

        compile_ahead(self._device, rehearse)
        for shape in prefills:
            self.graphs.plan(shape, partial(self._prefill_work, shape))
        for batch, length in steps:
            self.graphs.plan((batch, length), partial(self._decode_work, batch, length))
        # the largest first: all others reuse its memory
        first_prefills = [shape for shape in prefills if shape.spans == 1 and shape.tokens <= _FIRST_PREFILL]
        first_steps = [(batch, length) for batch, length in steps if length == lengths[0]]
        for key in (prefills[-1], steps[-1], *first_prefills, *first_steps):
            self.graphs.record(key)

    def prefill(
        self, ids: list[int], spans: list[RowSpan], complete: list[int], records: np.ndarray
    ) -> Tensor:
        shape, recorded = self._prefill_bucket(len(ids), len(spans))
        work = self.graphs.use(shape, partial(self._prefill_work, shape)) if recorded else None
        batch = pinned(shape.pack(ids, spans, complete, records, self._slots.slots_of), self._device)
        if work is None:
            tokens = self._prefill_step(shape, batch.to(self._device, non_blocking=True))
        else:
            assert work.inputs is not None  # see _prefill_work
            work.inputs.copy_(batch, non_blocking=True)
            tokens = work.run()
        return tokens[None, : len(complete)]

    def decode(self, spans: list[RowSpan]) -> Tensor:
        self._slots.upload((span.row, span.start, span.end) for span in spans)
        steps = max(span.length for span in spans)
        batch, length = self._batch_bucket(len(spans)), self._length_bucket(max(span.end for span in spans))
        recorded = batch <= self._options.graph_max_batch and length <= self._graph_len
        make = partial(self._decode_work, batch, length)
        work = self.graphs.use((batch, length), make) if recorded else make()
        rows = np.array([span.row for span in spans], np.int32)
        takes_part = np.arange(steps)[:, None] < [span.length for span in spans]
        schedule = np.full((steps, batch), -1, np.int32)
        schedule[:, : len(spans)] = np.where(takes_part, rows, -1)
        self._schedule[: schedule.size].copy_(upload(schedule.ravel(), self._device))
        self._steps.zero_()
        for _ in range(steps):
            work.run()
        return self._tokens[: schedule.size].view(steps, batch)[:, : len(spans)]

    def _decode_work(self, batch: int, length: int) -> SizedWork:
        return SizedWork(partial(self._decode_step, batch, length), self._empty_schedule)

    def _prefill_work(self, shape: PrefillShape) -> SizedWork:
        flat = upload(shape.empty(), self._device)
        return SizedWork(
            partial(self._prefill_step, shape, flat),
            lambda: flat.copy_(upload(shape.empty(), self._device)),
            inputs=flat,
        )

    def _empty_schedule(self) -> None:
        self._schedule.fill_(-1)
        self._steps.zero_()

    def _decode_step(self, batch: int, length: int) -> None:
        room = self._most_steps * batch
        schedule, tokens = (x[:room].view(-1, batch) for x in (self._schedule, self._tokens))
        steps = self._steps[:batch]
        x, rows, lengths = advance(self._states, self._lm.embedding, schedule, steps)

        def attend(qkv: Tensor, pool: LayerPool) -> Tensor:
            return decode_attention(qkv, self._lm.rope, pool, self._table, rows, lengths, length)

        self._draw(self._lm(x, attend), self._states, rows, tokens, steps)

    def _prefill_step(self, shape: PrefillShape, flat: Tensor) -> Tensor:
        """Run a prefill; return the sampled tokens (spans,) int32. It also writes the slots and states of its
        requests, so that one copy brings all that the host has to say."""
        batch = shape.unpack(flat)
        write_rows(self._states, batch.draws, batch.records)
        spans = (batch.rows, batch.starts, batch.lengths, batch.offsets)
        write_slots(self._table, batch.slots, *spans, batch.blocks)

        def attend(qkv: Tensor, pool: LayerPool) -> Tensor:
            q = rotary_kv_write(qkv, self._lm.rope, batch.positions, batch.slots, pool)
            return prefill_attention(q, pool, self._table, *spans, batch.blocks)

        logits = self._lm(F.embedding(batch.ids, self._lm.embedding), attend, batch.last)
        drawn = torch.empty_like(batch.draws)
        self._draw(logits, self._states, batch.draws, drawn[None], None)
        return drawn

    def _prefill_bucket(self, tokens: int, spans: int) -> tuple[PrefillShape, bool]:
        """Return the smallest size that holds the batch, and whether it runs as a graph."""
        if not self._options.graph_max_batch or tokens > _PREFILL_TOKENS[-1] or spans > _PREFILL_SPANS[-1]:
            return self._prefill_shape(tokens, spans), False
        tokens = next(size for size in _PREFILL_TOKENS if size >= tokens)
        return self._prefill_shape(tokens, next(size for size in _PREFILL_SPANS if size >= spans)), True

    def _prefill_shape(self, tokens: int, spans: int) -> PrefillShape:
        return PrefillShape(tokens, spans, words=len(self._states.places))

    def _batch_bucket(self, batch: int) -> int:
        """Return the smallest recorded size that holds `batch` rows."""
        bucket = next((size for size in _BATCHES if size >= batch), -(-batch // 64) * 64)
        most = self._options.graph_max_batch
        return min(bucket, most) if batch <= most else bucket

    def _length_bucket(self, length: int) -> int:
        """Return the smallest recorded length bound, or the single bound used beyond those."""
        if length > self._graph_len:
            return self._options.max_len
        bucket = _SHORTEST
        while bucket < length:
            bucket *= 2
        return min(bucket, self._graph_len)
