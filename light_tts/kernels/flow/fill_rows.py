"""Writes the inputs of a packed batch's first Euler step (see packed_conv.py) other than the encoder's
features."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

FILL_ENTRIES = 3


def fill_rows(
    noise: Tensor, speakers: Tensor, known: Tensor | None, table: Tensor, x: Tensor, inputs: Tensor
) -> None:
    """Write x, (rows, mels) float32, and inputs, (2, rows, 4 * mels): a conditioned copy with noise,
    features, speaker and known mel side by side, and an unconditioned one with noise and zeros. The features
    are not written. table: (FILL_ENTRIES, rows) int32: the row of `noise`, -1: nothing is written; of
    `speakers`; and of `known`, -1: zeros instead. noise: (frames, mels) float32; speakers: (items, mels);
    known: (m, mels) float32; None: nothing is known."""
    count, mels = table.shape[1], x.shape[1]
    block_rows = 4
    _fill_rows_kernel[(triton.cdiv(count, block_rows),)](
        noise,
        speakers,
        noise if known is None else known,  # never read if absent
        table,
        x,
        inputs,
        inputs.stride(0),
        count,
        MELS=mels,
        BLOCK=triton.next_power_of_2(mels),
        BLOCK_ROWS=block_rows,
        num_warps=4,
    )


def fill_rows_reference(
    noise: Tensor, speakers: Tensor, known: Tensor | None, table: Tensor, x: Tensor, inputs: Tensor
) -> None:
    row = (table[0] >= 0).nonzero()[:, 0]
    frame, speaker, place = table[:, row].long()
    mels = x.shape[1]
    x[row] = noise[frame]
    inputs[:, row, :mels] = x[row].to(inputs.dtype)
    inputs[0, row, 2 * mels : 3 * mels] = speakers[speaker]
    inputs[0, row, 3 * mels :] = 0
    if known is not None:
        has_mel = place >= 0
        inputs[0, row[has_mel], 3 * mels :] = known[place[has_mel]].to(inputs.dtype)
    inputs[1, row, mels:] = 0


@triton.jit(do_not_specialize=["count"])
def _fill_rows_kernel(
    noise_ptr,
    speakers_ptr,
    known_ptr,
    table_ptr,
    x_ptr,
    inputs_ptr,
    copy_stride,
    count,
    MELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < count
    frame = tl.load(table_ptr + row, mask=inside, other=-1)
    speaker = tl.load(table_ptr + count + row, mask=inside, other=0)
    place = tl.load(table_ptr + 2 * count + row, mask=inside, other=-1)
    column = tl.arange(0, BLOCK)
    mask = (frame >= 0)[:, None] & (column < MELS)[None, :]
    dtype: tl.constexpr = inputs_ptr.dtype.element_ty
    noise = tl.load(noise_ptr + frame[:, None] * MELS + column[None, :], mask=mask, other=0.0)
    tl.store(x_ptr + row[:, None] * MELS + column[None, :], noise, mask=mask)
    spoken = tl.load(speakers_ptr + speaker[:, None] * MELS + column[None, :], mask=mask, other=0.0)
    has_mel = mask & (place >= 0)[:, None]
    mel = tl.load(known_ptr + place[:, None] * MELS + column[None, :], mask=has_mel, other=0.0)
    conditioned = inputs_ptr + row[:, None] * (4 * MELS) + column[None, :]
    tl.store(conditioned, noise.to(dtype), mask=mask)
    tl.store(conditioned + 2 * MELS, spoken.to(dtype), mask=mask)
    tl.store(conditioned + 3 * MELS, mel.to(dtype), mask=mask)
    unconditioned = conditioned + copy_stride
    zero = tl.zeros((BLOCK_ROWS, BLOCK), dtype)
    tl.store(unconditioned, noise.to(dtype), mask=mask)
    tl.store(unconditioned + MELS, zero, mask=mask)
    tl.store(unconditioned + 2 * MELS, zero, mask=mask)
    tl.store(unconditioned + 3 * MELS, zero, mask=mask)
