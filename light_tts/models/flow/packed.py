"""The flow on a GPU: speech tokens of any mix of requests to mel frames, in one packed batch.

Long and short items, first and later chunks, with and without the chunk mask, all share the rows of one batch
(see unet/packed.py). Only the encoder, two percent of the work, uses padding. Encoder and Euler step are CUDA
graphs by size.

With a memory, each chunk of a stream continues the previous one, and requests with the same voice share the
cost of its recording: with the chunk mask, earlier frames do not depend on later ones. Only the encoder
reprocesses everything. If no page is left, a chunk is recomputed together with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from light_tts.common.cuda_graphs import GraphCache, SizedWork
from light_tts.common.transfer import pinned, upload
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.flow.packed_attention import attention_blocks
from light_tts.kernels.flow.resnet_block import new_rows
from light_tts.models.checkpoint.config import MAX_FRAMES
from light_tts.models.flow.cfm import fixed_noise
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.memos import Memo
from light_tts.models.flow.packed_memory import PackedMemory, PackedSpan, reserve
from light_tts.models.flow.unet.packed import PackedEstimator
from light_tts.models.flow.unet.page_store import COPIES
from light_tts.models.flow.unet.rows import Rows

ROW_LIMIT = 8192  # frames per solve; more would not be faster. A single longer item is solved alone.
WIDTH_STEP = 32  # tokens; granularity of the encoder's sizes
WARM_TOKENS = 256  # 10 s of prompt and speech
FIRST_ROWS = 640  # frames; sizes recorded before the first request: a prompt of 10 s and a first chunk
FEW_ROWS = 1024  # up to this many frames, fewer and smaller kernels are faster (see packed_linear)
ENCODER_LIMIT = 32 * 256**2  # items x tokens^2 per encoder run; bounds the memory of its attention


def pack(flow: Flow, dtype: torch.dtype) -> PackedEstimator:
    """Return the estimator of a flow in float32, with weights in `dtype`."""
    return PackedEstimator(flow.decoder.estimator, flow.decoder.steps, flow.decoder.guidance, dtype)


def share(
    flow: Flow, dtype: torch.dtype, items: int, room: int, automatic: bool = False
) -> Callable[[], PackedFlow]:
    """Return a factory of instances that share weights in `dtype` and a memory of `room` bytes (0: none); for
    `automatic` see `reserve`. Takes over the weights of `flow`, which is in float32. Raises TooLittleMemory.
    """
    estimator = pack(flow, dtype)
    memory = reserve(flow, estimator, room, automatic) if room or automatic else None
    del flow.decoder.estimator
    flow.to(dtype)
    return lambda: PackedFlow(flow, estimator, items, memory)


def attention_rows(frames: int) -> int:
    """Return the number of queries of a program of the attention, if it is a kernel of its own."""
    return 32 if frames <= 512 else 64


class PackedFlow:
    """`estimator`: `pack(flow)`, shared by all instances; `items`: maximum batch size; `memory`: None: every
    chunk is computed from the beginning. The results of a call do not depend on the other items in it, except
    for rounding. Not thread-safe; all work uses the current CUDA stream, which must not change."""

    packed = True

    def __init__(
        self,
        flow: Flow,
        estimator: PackedEstimator,
        items: int,
        memory: PackedMemory | None = None,
        graphs: bool = True,
    ) -> None:
        self._flow = flow
        self._memory = memory
        self._items = items
        self._device = flow.spk_embed_affine_layer.weight.device
        self._chunk = flow.decoder.chunk_size
        self._estimator = estimator
        self._mels = estimator.mels
        self._noise = fixed_noise(self._mels, self._device)[0].T.contiguous()  # (MAX_FRAMES, mels)
        self.graphs = GraphCache(self._device, graphs)
        self._largest = self._estimator.allocate(0)
        self._sizes: dict[int, Rows] = {}

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

        def rehearse() -> None:
            for size in sizes:
                self._estimator.step(self._rows(size))

        if first:
            compile_ahead(self._device, rehearse)
        for size in sizes:
            self.graphs.plan(("step", size), partial(self._step_work, self._rows(size)))
        for height in heights:
            for width in widths:
                self.graphs.plan(("encode", height, width), partial(self._encoder_work, height, width))
        self.graphs.record(("encode", heights[-1], widths[-1]))  # all others reuse its memory
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
        # The device encodes while the host prepares the rest.
        encoded = [self._encode(batch) for batch in _split(spans, _encoder_has_room)]
        total = sum(span.frames for span in spans)
        rows = self._rows(_bucket(total))
        step = self.graphs.use(("step", rows.size), partial(self._step_work, rows))
        self._place(rows, spans)
        self._fill(rows, spans, encoded)
        for _ in range(self._estimator.steps):
            step.run()
        return rows.buffers.x[:total].clone()

    # ---- rows

    def _rows(self, size: int) -> Rows:
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
        buffers = self._largest.first(size, size <= FEW_ROWS, joined=tile is not None)
        pages = 0 if store is None else self._items * (MAX_FRAMES // store.frames)
        blocks, tiles = size // block_rows + self._items, 0
        tile_rows = self._estimator.rows_of_resnet_tile(COPIES * size)
        if tile_rows is not None:
            tiles = size // new_rows(tile_rows) + self._items
        rows = Rows(buffers, blocks, block_rows, store, pages, tiles, tile_rows)
        self._sizes[size] = rows
        return rows

    def _step_work(self, rows: Rows) -> SizedWork:
        """Return an Euler step. It changes x and the step counter, so it is recorded with empty rows."""
        return SizedWork(partial(self._estimator.step, rows), rows.clear)

    def _place(self, rows: Rows, spans: list[PackedSpan]) -> None:
        """Write the position of each item's rows to the device and reset to step 0."""
        table = rows.empty()
        parts = rows.parts(table)
        lengths = [span.frames for span in spans]
        position = np.concatenate([np.arange(length) for length in lengths])
        parts.position.reshape(COPIES, -1)[:, : len(position)] = position
        chunks = [self._chunk if span.item.streaming else 0 for span in spans]
        prefixes = None if self._memory is None else self._memory.place(parts, spans)
        parts.blocks[:] = attention_blocks(lengths, chunks, rows.block_rows, len(parts.blocks), prefixes)
        if rows.tile_rows is not None:
            frames = new_rows(rows.tile_rows)
            parts.tiles[:] = attention_blocks(lengths, chunks, frames, len(parts.tiles))
        rows.table.copy_(pinned(table, self._device), non_blocking=True)

    def _fill(self, rows: Rows, spans: list[PackedSpan], encoded: list[Tensor]) -> None:
        """Write the estimator's inputs: noise, encoded tokens, speaker and the prompt's mel, side by side;
        the unconditioned copy has only the noise. encoded: (frames, mels) of consecutive spans."""
        mels, size, total = self._mels, rows.size, sum(span.frames for span in spans)
        x = rows.buffers.x[:total]
        frame = np.concatenate([np.arange(span.start, span.end, dtype=np.int32) for span in spans])
        torch.index_select(self._noise, 0, upload(frame, self._device), out=x)
        conditioned, unconditioned = rows.buffers.inputs[:total], rows.buffers.inputs[size:][:total]
        conditioned[:, :mels] = x
        unconditioned[:, :mels] = x
        unconditioned[:, mels:].zero_()
        conditioned[:, 3 * mels :].zero_()
        speakers = self._flow.speaker(torch.stack([span.item.embedding for span in spans]))
        start = 0
        for span, speaker in zip(spans, speakers, strict=True):
            own = conditioned[start : start + span.frames]
            own[:, 2 * mels : 3 * mels] = speaker
            known = span.item.prompt_mel[span.start : span.prompt]
            own[: len(known), 3 * mels :] = known
            start += span.frames
        start = 0
        for features in encoded:
            conditioned[start : start + len(features), mels : 2 * mels] = features
            start += len(features)

    # ---- encoder

    def _encode(self, spans: list[PackedSpan]) -> Tensor:
        """Return (frames of all spans, mels): the concatenated features of the encoder."""
        ids = [np.concatenate([span.item.prompt, span.item.tokens]) for span in spans]
        width = _round_up(max(map(len, ids)), WIDTH_STEP)
        height = _batch_bucket(len(spans))
        table = np.zeros((height, 3 + width), np.int32)
        table[:, 0], table[:, 2] = 1, 1  # unused items: one token, finalize
        for row, (span, own) in enumerate(zip(spans, ids, strict=True)):
            table[row, :3] = len(own), span.item.streaming, span.item.finalize
            table[row, 3 : 3 + len(own)] = own
        features = self._features(table)
        row_length = self._flow.ratio * width
        index = np.concatenate(
            [
                np.arange(span.start, span.end, dtype=np.int32) + row * row_length
                for row, span in enumerate(spans)
            ]
        )
        return features.index_select(0, upload(index, self._device))

    def _features(self, table: np.ndarray) -> Tensor:
        """table: (items, 3 + tokens) int32, each row length, streaming, finalize, ids -> (items * ratio *
        tokens, mels)"""
        height, width = table.shape[0], table.shape[1] - 3
        work = self.graphs.use(("encode", height, width), partial(self._encoder_work, height, width))
        assert work.inputs is not None  # see _encoder_work
        work.inputs.copy_(pinned(table, self._device), non_blocking=True)
        return work.run()

    def _encoder_work(self, height: int, width: int) -> SizedWork:
        inputs = torch.ones(height, 3 + width, dtype=torch.int32, device=self._device)

        def run() -> Tensor:
            lengths, streaming, finalize = inputs[:, 0].long(), inputs[:, 1] > 0, inputs[:, 2] > 0
            features, _ = self._flow.encode(inputs[:, 3:].long(), lengths, streaming, finalize, width)
            return self._flow.encoder_proj(features).flatten(0, 1)

        return SizedWork(run, inputs=inputs)


def _split(items: list, fits: Callable[[list], bool]) -> list[list]:
    """Split into runs of consecutive items that fit (a single one always does)."""
    batches: list[list] = []
    for item in items:
        if batches and fits([*batches[-1], item]):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def _encoder_has_room(spans: list[PackedSpan]) -> bool:
    longest = max(len(span.item.prompt) + len(span.item.tokens) for span in spans)
    return len(spans) * longest**2 <= ENCODER_LIMIT


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
