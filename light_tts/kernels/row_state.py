"""The inputs of a decode step, from what the device keeps of each request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.common.row_state import RowState

_BLOCK = 128


def advance(state: RowState, table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of one decode step; counts its tokens in `state.position`.

    table: (rows, max_len) int32 slots; rows: (tokens,) int32, all different, negative: only fills up the
    batch -> ids to feed, their positions, their slots, and lengths (positions + 1), all (tokens,) int32;
    0, 0, -1, 0 where a row is negative"""
    ids, positions, slots, lengths = (torch.empty_like(rows) for _ in range(4))
    _advance_kernel[(triton.cdiv(len(rows), _BLOCK),)](
        state.next_id,
        state.position,
        table,
        rows,
        ids,
        positions,
        slots,
        lengths,
        len(rows),
        table.shape[1],
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return ids, positions, slots, lengths


def advance_reference(state: RowState, table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    live = rows >= 0
    index = rows.clamp(min=0).long()
    positions = state.position[index].where(live, 0)
    slots = table[index, positions.long()].where(live, -1)
    ids = state.next_id[index].where(live, 0)
    state.position[index[live]] += 1
    return ids, positions, slots, positions + live.int()


@triton.jit(do_not_specialize=["tokens"])
def _advance_kernel(
    next_id_ptr,
    position_ptr,
    table_ptr,
    rows_ptr,
    ids_ptr,
    positions_ptr,
    slots_ptr,
    lengths_ptr,
    tokens,
    max_len,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = token < tokens
    row = tl.load(rows_ptr + token, mask=exists, other=-1).to(tl.int64)
    live = row >= 0
    position = tl.load(position_ptr + row, mask=live, other=0)
    slot = tl.load(table_ptr + row * max_len + position, mask=live, other=-1)
    tl.store(ids_ptr + token, tl.load(next_id_ptr + row, mask=live, other=0), mask=exists)
    tl.store(positions_ptr + token, position, mask=exists)
    tl.store(slots_ptr + token, slot, mask=exists)
    tl.store(lengths_ptr + token, position + live.to(tl.int32), mask=exists)
    tl.debug_barrier()  # every thread has read the position
    tl.store(position_ptr + row, position + 1, mask=live)
