"""The flow on a GPU: speech tokens of any mixture of requests to mel frames, in one packed batch.

Long and short, first chunks and later ones, with and without the chunk mask: all share the rows of one batch
(see unet/packed.py), so nothing is spent on padding but for the encoder, a fiftieth of the work. Encoder
and Euler step are CUDA graphs by size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from light_tts.common.cuda_graphs import GraphCache
from light_tts.common.transfer import pinned, upload
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.flow.packed_attention import attention_blocks
from light_tts.models.flow.cfm import MAX_FRAMES, fixed_noise
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.interface import FlowItem
from light_tts.models.flow.unet.packed import COPIES, PackedEstimator, Rows

ROW_LIMIT = 8192  # frames of one solve; more would not be faster. One longer item is solved alone.
WIDTH_STEP = 32  # tokens; sizes of the encoder
WARM_TOKENS = 256  # 10 s of prompt and speech
FEW_ROWS = 1024  # frames up to which fewer, smaller kernels are faster (see packed_linear)
ENCODER_LIMIT = 32 * 256**2  # items x tokens^2 of one encoder run: bounds the memory of its attention


def pack(flow: Flow, dtype: torch.dtype) -> PackedEstimator:
    """The estimator of a flow that is in float32, with weights in `dtype`."""
    return PackedEstimator(flow.decoder.estimator, flow.decoder.steps, flow.decoder.guidance, dtype)


class PackedFlow:
    """`estimator`: `pack(flow)`, shared by all instances; `items`: most that come at once. The results of one
    call do not depend on which items share it but for rounding. Not thread-safe; all work is done in the
    current CUDA stream, which must not change."""

    packed = True

    def __init__(self, flow: Flow, estimator: PackedEstimator, items: int, graphs: bool = True) -> None:
        self._flow = flow
        self._items = items
        self._device = flow.spk_embed_affine_layer.weight.device
        self._chunk = flow.decoder.chunk_size
        self._estimator = estimator
        self._mels = estimator.mels
        self._noise = fixed_noise(self._mels, self._device)[0].T.contiguous()  # (MAX_FRAMES, mels)
        self._graphs = GraphCache(self._device, graphs)
        self._largest = self._estimator.allocate(0)
        self._sizes: dict[int, Rows] = {}
        self._encoder_inputs: dict[tuple[int, int], Tensor] = {}

    def frames(self, item: FlowItem) -> int:
        """Mel frames of prompt and speech. Raises ValueError when there is nothing to speak or too much."""
        spoken = len(item.tokens) - (0 if item.finalize else self._flow.lookahead)
        if spoken <= 0:
            raise ValueError(f"flow: {len(item.tokens)} tokens leave nothing to speak")
        frames = self._flow.ratio * (len(item.prompt) + spoken)
        if frames > MAX_FRAMES:
            raise ValueError(f"{frames} mel frames of prompt and speech are more than {MAX_FRAMES}")
        return frames

    @torch.inference_mode()
    def __call__(self, items: Sequence[FlowItem]) -> list[Tensor]:
        """The mel spectrogram of each item's tokens: (frames, mels) float32. Raises ValueError."""
        frames = [self.frames(item) for item in items]
        order = sorted(range(len(items)), key=lambda index: frames[index])
        mels: dict[int, Tensor] = {}
        for batch in _split(order, lambda batch: sum(frames[i] for i in batch) <= ROW_LIMIT):
            mels.update(self._solve(batch, items, frames))
        return [mels[index] for index in range(len(items))]

    @torch.inference_mode()
    def warm_up(self, items: int) -> None:
        """Compile and record what batches of up to `items` need whose prompts and speech are together up to
        WARM_TOKENS long. The rest is recorded when it is first met."""
        sizes = list(_buckets(min(ROW_LIMIT, items * WARM_TOKENS * self._flow.ratio)))

        def rehearse() -> None:
            for size in sizes:
                self._estimator.step(self._rows(size))

        compile_ahead(self._device, rehearse)
        for size in sizes:
            self._prepare(self._rows(size))
        for height in sorted({_batch_bucket(count) for count in range(1, items + 1)}):
            for width in range(WIDTH_STEP, WARM_TOKENS + 1, WIDTH_STEP):
                self._features(np.ones((height, 3 + width), np.int32))

    def _solve(self, batch: list[int], items: Sequence[FlowItem], frames: list[int]) -> dict[int, Tensor]:
        total = sum(frames[index] for index in batch)
        rows = self._rows(_bucket(total))
        self._prepare(rows)
        self._place(rows, [frames[i] for i in batch], [items[i].streaming for i in batch])
        self._fill(rows, [items[index] for index in batch], [frames[index] for index in batch])
        for _ in range(self._estimator.steps):
            self._graphs.run(("step", rows.size), lambda: self._estimator.step(rows))
        mel, start, found = rows.buffers.x[:total].clone(), 0, {}
        for index in batch:
            prompt = self._flow.ratio * len(items[index].prompt)
            found[index] = mel[start + prompt : start + frames[index]]
            start += frames[index]
        return found

    # ---- rows

    def _rows(self, size: int) -> Rows:
        """The rows for `size` frames; all sizes share the memory of the largest so far."""
        if size in self._sizes:
            return self._sizes[size]
        if size > len(self._largest.x):
            self._graphs.clear()  # they know the old addresses
            self._encoder_inputs.clear()
            self._sizes.clear()
            self._largest = self._estimator.allocate(max(size, _bucket(ROW_LIMIT)))
        block_rows = 32 if size <= 512 else 64
        buffers = self._largest.first(size, few=size <= FEW_ROWS)
        rows = self._sizes[size] = Rows(buffers, size // block_rows + self._items, block_rows)
        return rows

    def _prepare(self, rows: Rows) -> None:
        """Record the step while the rows are empty: running it moves x and counts."""
        if self._graphs.enabled and ("step", rows.size) not in self._graphs:
            rows.clear()
            self._graphs.record(("step", rows.size), lambda: self._estimator.step(rows))

    def _place(self, rows: Rows, frames: list[int], streaming: list[bool]) -> None:
        """Say on the device where each item's rows are, and begin at step 0."""
        table = np.zeros(len(rows.table), np.int32)
        _, position, blocks = rows.parts(table)
        position.fill(-1)
        position.reshape(COPIES, -1)[:, : sum(frames)] = np.concatenate([np.arange(n) for n in frames])
        chunks = [self._chunk if masked else 0 for masked in streaming]
        blocks[:] = attention_blocks(frames, chunks, rows.block_rows, len(blocks))
        rows.table.copy_(pinned(table, self._device), non_blocking=True)

    def _fill(self, rows: Rows, items: list[FlowItem], frames: list[int]) -> None:
        """What the estimator is given: noise, encoded tokens, speaker and the prompt's mel, side by side; of
        these the unconditioned copy has the noise only."""
        mels, size, total = self._mels, rows.size, sum(frames)
        x = rows.buffers.x[:total]
        torch.index_select(self._noise, 0, rows.position[:total], out=x)
        conditioned, unconditioned = rows.buffers.inputs[:total], rows.buffers.inputs[size:][:total]
        conditioned[:, :mels] = x
        unconditioned[:, :mels] = x
        unconditioned[:, mels:].zero_()
        conditioned[:, 3 * mels :].zero_()
        speakers = self._flow.speaker(torch.stack([item.embedding for item in items]))
        start = 0
        for item, speaker, count in zip(items, speakers, frames, strict=True):
            span = conditioned[start : start + count]
            span[:, 2 * mels : 3 * mels] = speaker
            prompt = self._flow.ratio * len(item.prompt)
            if prompt:
                span[:prompt, 3 * mels :] = item.prompt_mel[:prompt]
            start += count
        start = 0
        for batch in _split(items, _encoder_has_room):
            count = sum(frames[: len(batch)])
            conditioned[start : start + count, mels : 2 * mels] = self._encode(batch, frames[: len(batch)])
            start, frames = start + count, frames[len(batch) :]

    # ---- encoder

    def _encode(self, items: list[FlowItem], frames: list[int]) -> Tensor:
        """-> (sum of frames, mels), the encoder's features of all items one after the other."""
        ids = [np.concatenate([item.prompt, item.tokens]) for item in items]
        width = _round_up(max(map(len, ids)), WIDTH_STEP)
        height = _batch_bucket(len(items))
        table = np.zeros((height, 3 + width), np.int32)
        table[:, 0], table[:, 2] = 1, 1  # items that are not there: one token, finalize
        for row, (item, own) in enumerate(zip(items, ids, strict=True)):
            table[row, :3] = len(own), item.streaming, item.finalize
            table[row, 3 : 3 + len(own)] = own
        features = self._features(table)
        row_length = self._flow.ratio * width
        index = np.concatenate(
            [np.arange(count, dtype=np.int32) + row * row_length for row, count in enumerate(frames)]
        )
        return features.index_select(0, upload(index, self._device))

    def _features(self, table: np.ndarray) -> Tensor:
        """table: (items, 3 + tokens) int32, each row length, streaming, finalize, ids -> (items * ratio *
        tokens, mels)"""
        height, width = table.shape[0], table.shape[1] - 3
        inputs = self._encoder_inputs.get((height, width))
        if inputs is None:
            inputs = torch.empty(height, 3 + width, dtype=torch.int32, device=self._device)
            self._encoder_inputs[height, width] = inputs
        inputs.copy_(pinned(table, self._device), non_blocking=True)

        def run() -> Tensor:
            lengths, streaming, finalize = inputs[:, 0].long(), inputs[:, 1] > 0, inputs[:, 2] > 0
            features, _ = self._flow.encode(inputs[:, 3:].long(), lengths, streaming, finalize, width)
            return self._flow.encoder_proj(features).flatten(0, 1)

        return self._graphs.run(("encode", height, width), run)


def _split(items: list, fits: Callable[[list], bool]) -> list[list]:
    """Cut into runs of neighbours that fit (one alone always does)."""
    batches: list[list] = []
    for item in items:
        if batches and fits([*batches[-1], item]):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def _encoder_has_room(items: list[FlowItem]) -> bool:
    longest = max(len(item.prompt) + len(item.tokens) for item in items)
    return len(items) * longest**2 <= ENCODER_LIMIT


def _bucket(frames: int) -> int:
    """The next size of which there are buffers: steps of an eighth to a quarter, at least 64."""
    return _round_up(frames, max(64, 2 ** (frames.bit_length() - 1) // 4))


def _buckets(most: int) -> Iterator[int]:
    """All sizes up to `most`."""
    size = _bucket(1)
    while size <= most:
        yield size
        size = _bucket(size + 1)


def _batch_bucket(items: int) -> int:
    return _round_up(items, max(1, 2 ** (items.bit_length() - 1) // 2))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
