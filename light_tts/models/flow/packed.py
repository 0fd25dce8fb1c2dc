"""The flow on a GPU: speech tokens of any mix of requests to mel frames, in one packed batch.

Long and short items, first and later chunks, with and without the chunk mask, all share the rows of one batch
(see packed_rows.py). Only the encoder, two percent of the work, uses padding (see encoder_table.py). Encoder
and Euler step are CUDA graphs by size.

With a memory, each chunk of a stream continues the previous one, and requests with the same voice share the
cost of its recording: with the chunk mask, earlier frames do not depend on later ones. Only the encoder
reprocesses everything. If no page is left, a chunk is recomputed together with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from light_tts.common.cuda_graphs import GraphCache, SizedWork
from light_tts.common.transfer import pinned
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.flow.fill_rows import fill_rows
from light_tts.kernels.flow.resnet_block import has_room, lines_of
from light_tts.models.checkpoint.config import MAX_FRAMES
from light_tts.models.flow.base import BaseFlow
from light_tts.models.flow.cfm import fixed_noise
from light_tts.models.flow.encoder_table import EncoderItem, TableEncoder
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.memos import Memo
from light_tts.models.flow.packed_memory import PackedMemory, PackedSpan, reserve
from light_tts.models.flow.packed_rows import BuffersT, Rows
from light_tts.models.flow.page_store import COPIES
from light_tts.models.flow.step_estimator import StepEstimator

ROW_LIMIT = 8192  # frames per solve; more would not be faster. A single longer item is solved alone.
WIDTH_STEP = 32  # tokens; granularity of the encoder's sizes
WARM_TOKENS = 256  # 10 s of prompt and speech
FIRST_ROWS = 640  # frames; sizes recorded before the first request: a prompt of 10 s and a first chunk
ENCODER_LIMIT = 32 * 256  # items x tokens per encoder run; bounds its memory


def share(
    flow: BaseFlow,
    estimator: StepEstimator[BuffersT],
    encoder: TableEncoder,
    items: int,
    room: int,
    automatic: bool = False,
    ended: Callable[[str], None] = lambda phase: None,
) -> Callable[[], PackedFlow[BuffersT]]:
    """Return a factory of instances that share the weights of estimator and encoder, made from `flow`, and a
    memory of `room` bytes (0: none); for `automatic` see `reserve`, for `ended` `choose_flow`. Deletes the
    weights of `flow` that are no longer used. Raises TooLittleMemory."""
    memory = reserve(flow, estimator, room, automatic) if room or automatic else None
    ended("flow memory")
    for name, _ in list(flow.named_children()):
        if name not in ("decoder", "spk_embed_affine_layer"):
            delattr(flow, name)
    del flow.decoder.estimator, flow.decoder.backend
    flow.to(estimator.dtype)
    return lambda: PackedFlow(flow, estimator, encoder, items, memory)


def attention_rows(frames: int) -> int:
    """Return the number of queries of a program of the attention, if it is a kernel of its own."""
    return 32 if frames <= 512 else 64


class PackedFlow(Generic[BuffersT]):
    """`estimator`, `encoder`: made from `flow`, shared by all instances; `items`: maximum batch size;
    `memory`: None: every chunk is computed from the beginning. The results of a call do not depend on the
    other items in it, except for rounding. Not thread-safe; all work uses the current CUDA stream, which must
    not change."""

    packed = True

    def __init__(
        self,
        flow: BaseFlow,
        estimator: StepEstimator[BuffersT],
        encoder: TableEncoder,
        items: int,
        memory: PackedMemory | None = None,
        graphs: bool = True,
    ) -> None:
        self._flow = flow
        self._encoder = encoder
        self._memory = memory
        self._items = items
        self._device = flow.spk_embed_affine_layer.weight.device
        self._chunk = flow.decoder.chunk_size
        self._estimator = estimator
        self._mels = estimator.mels
        self._noise = fixed_noise(self._mels, self._device)[0].T.contiguous()  # (MAX_FRAMES, mels)
        self.graphs = GraphCache(self._device, graphs)
        self._largest = self._estimator.allocate(0)
        self._sizes: dict[int, Rows[BuffersT]] = {}
        self._speakers: WeakKeyDictionary[Memo, Tensor] = WeakKeyDictionary()  # by voice: (1, mels)

    def frames(self, item: FlowItem) -> int:
        """Return the number of mel frames of prompt and speech. Raises ValueError if there is nothing to
        speak or too much."""
        spoken = len(item.tokens) - (0 if item.finalize else self._flow.lookahead)
        if spoken <= 0:
            raise ValueError(f"flow: {len(item.tokens)} tokens leave nothing to speak")
        frames = self._flow.ratio * (len(item.prompt) + spoken)
        if frames > MAX_FRAMES:
            raise ValueError(f"{frames} mel frames of prompt and speech exceed {MAX_FRAMES}")
        return frames

    @torch.inference_mode()
    def __call__(self, items: Sequence[FlowItem]) -> list[Tensor]:
        """Return the mel spectrogram of each item's tokens: (frames, mels) float32. Raises ValueError."""
        spans = [self._span(item) for item in items]
        order = sorted(range(len(items)), key=lambda index: spans[index].frames)
        mels: dict[int, Tensor] = {}
        for batch in _split(order, lambda batch: sum(spans[i].frames for i in batch) <= ROW_LIMIT):
            found = self._solve([spans[index] for index in batch])
            mels.update(zip(batch, found, strict=True))
        return [mels[index] for index in range(len(items))]

    def cached_frames(self, voice: Memo, stream: Memo) -> int:
        """Return how many frames of a streamed item with these memos need not be computed again."""
        return 0 if self._memory is None else self._memory.cached_frames(voice, stream)

    @torch.inference_mode()
    def warm_up(self, items: int, first: bool = True) -> None:
        """Plan the graphs of batches of up to `items` whose prompts and speech are together at most
        WARM_TOKENS long: few frames first. Other sizes are added when they are used. The first instance also
        compiles the kernels, and records what a single first chunk needs."""
        sizes = list(_buckets(min(ROW_LIMIT, items * WARM_TOKENS * self._flow.ratio)))
        heights = sorted({_batch_bucket(count) for count in range(1, items + 1)})
        widths = range(WIDTH_STEP, WARM_TOKENS + 1, WIDTH_STEP)
        # of the encoder; its kernels depend on the number of rows only
        shapes = {height * width: (height, width) for height in heights for width in widths}

        def rehearse() -> None:
            estimator = self._estimator.shortened()
            for size in sizes:
                estimator.step(self._rows(size))
            encoder = self._encoder.shortened()
            for height, width in shapes.values():
                self._encoder_work(height, width, encoder).run()
            rows = self._rows(sizes[0])
            speakers = torch.zeros(1, self._mels, dtype=self._estimator.dtype, device=self._device)
            inputs = rows.buffers.inputs.view(COPIES, rows.size, -1)
            fill_rows(self._noise, speakers, None, rows.fill, rows.buffers.x, inputs)

        if first:
            compile_ahead(self._device, rehearse)
        self._plan_encoder(heights[-1], widths[-1])  # those recorded later reuse its memory
        for size in sizes:
            self.graphs.plan(("step", size), partial(self._step_work, self._rows(size)))
        for height in heights:
            for width in widths:
                self._plan_encoder(height, width)
        if first:
            for width in widths:
                self.graphs.record(("encode", 1, width))
            for size in (size for size in sizes if size <= FIRST_ROWS):
                self.graphs.record(("step", size))

    def _span(self, item: FlowItem) -> PackedSpan:
        end, prompt = self.frames(item), self._flow.ratio * len(item.prompt)
        if self._memory is None or not item.streaming:
            return PackedSpan(item, prompt, 0, end)
        return self._memory.span(item, prompt, end)

    def _solve(self, spans: list[PackedSpan]) -> list[Tensor]:
        if self._memory is not None:
            self._memory.wait(spans)
        try:
            mels = self._integrate(spans)
        finally:
            ready = None if self._memory is None else self._memory.hold(spans)
        found, start = [], 0
        for span in spans:
            new = mels[start : start + span.frames][max(0, span.prompt - span.start) :]
            found.append(new if span.mel is None else torch.cat([span.mel, new]))
            start += span.frames
            if self._memory is not None:
                self._memory.remember(span, found[-1], ready)
        return found

    def _integrate(self, spans: list[PackedSpan]) -> Tensor:
        """Return (frames of all spans, mels)."""
        total = sum(span.frames for span in spans)
        rows = self._rows_for([span.frames for span in spans])
        step = self.graphs.use(("step", rows.size), partial(self._step_work, rows))
        # The device encodes while the host prepares the rest.
        first = 0
        for batch in _split(spans, _encoder_has_room):
            self._encode(batch, first)
            first += sum(span.frames for span in batch)
        known = self._place(rows, spans)
        self._fill(rows, spans, known)
        for _ in range(self._estimator.steps):
            step.run()
        return rows.buffers.x[:total].clone()

    # ---- rows

    def _rows_for(self, lengths: list[int]) -> Rows[BuffersT]:
        """Return the rows of the smallest size with room for sequences of these lengths."""
        rows = self._rows(_bucket(sum(lengths)))
        while rows.tile_rows is not None and not has_room(len(rows.lines), lengths):
            rows = self._rows(_bucket(rows.size + 1))
        return rows

    def _rows(self, size: int) -> Rows[BuffersT]:
        """Return the rows for `size` frames; all sizes share the memory of the largest one so far."""
        if size in self._sizes:
            return self._sizes[size]
        if size > len(self._largest.x):
            self.graphs.clear()  # they refer to the old addresses
            self._sizes.clear()
            self._largest = self._estimator.allocate(max(size, _bucket(ROW_LIMIT)))
        store = None if self._memory is None else self._memory.store
        tile = self._estimator.rows_of_tile(COPIES * size)
        block_rows = tile or attention_rows(size)
        buffers = self._estimator.part(self._largest, size)
        pages = 0 if store is None else self._items * (MAX_FRAMES // store.frames)
        blocks = 0 if tile else size // block_rows + self._items
        tile_rows = self._estimator.rows_of_resnet_tile(COPIES * size)
        rows = Rows(buffers, blocks, block_rows, store, pages, tile_rows)
        self._sizes[size] = rows
        return rows

    def _step_work(self, rows: Rows[BuffersT]) -> SizedWork:
        """Return an Euler step. It changes x and the step counter, so it is recorded with empty rows."""
        return SizedWork(partial(self._estimator.step, rows), rows.clear)

    def _place(self, rows: Rows[BuffersT], spans: list[PackedSpan]) -> list[Tensor]:
        """Write the position of each item's rows to the device and reset to step 0. Returns the prompts' mel
        frames among the rows."""
        table = rows.empty()
        parts = rows.parts(table)
        lengths = [span.frames for span in spans]
        start, known_rows = 0, 0
        known: list[Tensor] = []
        for index, span in enumerate(spans):
            own = slice(start, start + span.frames)
            parts.position.reshape(COPIES, -1)[:, own] = np.arange(span.frames)
            frame, speaker, place = parts.fill[:, own]
            frame[:] = np.arange(span.start, span.end)
            speaker[:] = index
            if span.start < span.prompt:
                mel = span.item.prompt_mel[span.start : min(span.prompt, span.end)]
                place[: len(mel)] = np.arange(known_rows, known_rows + len(mel))
                known_rows += len(mel)
                known.append(mel.contiguous())
            start += span.frames
        chunks = [self._chunk if span.item.streaming else 0 for span in spans]
        prefixes = None if self._memory is None else self._memory.place(parts, spans)
        rows.place_attention(parts, lengths, chunks, prefixes)
        if rows.tile_rows is not None:
            before = None if self._memory is None else parts.before
            parts.lines[:] = lines_of(lengths, len(parts.lines), before)
        rows.table.copy_(pinned(table, self._device), non_blocking=True)
        return known

    def _fill(self, rows: Rows[BuffersT], spans: list[PackedSpan], known: list[Tensor]) -> None:
        """Write the other inputs of the estimator: noise, speaker and the prompt's mel, beside the encoded
        tokens; the unconditioned copy has only the noise. known: see `_place`."""
        fill_rows(
            self._noise,
            _joined([self._speaker(span.item) for span in spans]),
            _joined(known) if known else None,
            rows.fill,
            rows.buffers.x,
            rows.buffers.inputs.view(COPIES, rows.size, -1),
        )

    def _speaker(self, item: FlowItem) -> Tensor:
        """Return the projected embedding of the item's voice: (1, mels)"""
        if item.voice_memo not in self._speakers:
            self._speakers[item.voice_memo] = self._flow.speaker(item.embedding[None])
        return self._speakers[item.voice_memo]

    # ---- encoder

    def _encode(self, spans: list[PackedSpan], first: int) -> None:
        """Write the features of all spans to the rows of the estimator's inputs from `first` on."""
        items = []
        for span in spans:
            ids = np.concatenate([span.item.prompt, span.item.tokens])
            items.append(EncoderItem(ids, span.end // self._flow.ratio, span.item.streaming, span.start))
        height, width = _batch_bucket(len(items)), _round_up(max(len(one.ids) for one in items), WIDTH_STEP)
        work = self.graphs.use(("encode", height, width), partial(self._encoder_work, height, width))
        assert work.inputs is not None  # see _encoder_work
        table = self._encoder.table(items, first, height, width)
        work.inputs.copy_(pinned(table, self._device), non_blocking=True)
        work.run()

    def _plan_encoder(self, height: int, width: int) -> None:
        self.graphs.plan(("encode", height, width), partial(self._encoder_work, height, width))

    def _encoder_work(self, height: int, width: int, encoder: TableEncoder | None = None) -> SizedWork:
        """`encoder`: another one, for rehearsals."""
        encoder = encoder or self._encoder
        table = torch.from_numpy(encoder.empty(height, width)).to(self._device)
        parts = encoder.parts(table, height, width)
        features = self._largest.inputs[:, self._mels : 2 * self._mels]
        return SizedWork(partial(encoder, parts, features), inputs=table)


def _split(items: list, fits: Callable[[list], bool]) -> list[list]:
    """Split into runs of consecutive items that fit (a single one always does)."""
    batches: list[list] = []
    for item in items:
        if batches and fits([*batches[-1], item]):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def _joined(parts: list[Tensor]) -> Tensor:
    """Return the rows of all parts, of a single one without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _encoder_has_room(spans: list[PackedSpan]) -> bool:
    longest = max(len(span.item.prompt) + len(span.item.tokens) for span in spans)
    return len(spans) * longest <= ENCODER_LIMIT


def _bucket(frames: int) -> int:
    """Return the next size for which there are buffers: at least 64, in steps of an eighth to a quarter."""
    return max(64, _round_up(frames, max(16, 2 ** (frames.bit_length() - 1) // 4)))


def _buckets(most: int) -> Iterator[int]:
    """Yield all sizes up to `most`."""
    size = _bucket(1)
    while size <= most:
        yield size
        size = _bucket(size + 1)


def _batch_bucket(items: int) -> int:
    return _round_up(items, max(1, 2 ** (items.bit_length() - 1) // 2))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
