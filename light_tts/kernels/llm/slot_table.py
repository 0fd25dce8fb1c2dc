"""Writes the slots of new tokens to the device's slot table."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels.llm.prefill_attention import QUERY_BLOCK


def write_slots(
    table: Tensor,
    slots: Tensor,
    rows: Tensor,
    starts: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    blocks: Tensor,
) -> None:
    """Write the slots of spans to their positions. table: (rows, max_len) int32; slots: (tokens,) int32; the
    others as in `prefill_attention`."""
    _slots_kernel[(blocks.shape[0],)](
        table, slots, rows, starts, lengths, offsets, blocks, table.shape[1], BLOCK=QUERY_BLOCK, num_warps=2
    )


def write_slots_reference(
    table: Tensor,
    slots: Tensor,
    rows: Tensor,
    starts: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    blocks: Tensor,
) -> None:
    spans = zip(rows.tolist(), starts.tolist(), lengths.tolist(), offsets.tolist(), strict=True)
    for row, start, length, offset in spans:
        table[row, start : start + length] = slots[offset : offset + length]


@triton.jit
def _slots_kernel(
    table_ptr,
    slots_ptr,
    rows_ptr,
    starts_ptr,
    lengths_ptr,
    offsets_ptr,
    blocks_ptr,
    max_len,
    BLOCK: tl.constexpr,
):
    """One program per block of a span's tokens."""
    block = tl.program_id(0)
    span = tl.load(blocks_ptr + 2 * block)
    if span < 0:  # padding
        return
    token = tl.load(blocks_ptr + 2 * block + 1) + tl.arange(0, BLOCK)
    mine = token < tl.load(lengths_ptr + span)
    slots = tl.load(slots_ptr + tl.load(offsets_ptr + span) + token, mask=mine)
    row = tl.load(rows_ptr + span).to(tl.int64)
    tl.store(table_ptr + row * max_len + tl.load(starts_ptr + span) + token, slots, mask=mine)
