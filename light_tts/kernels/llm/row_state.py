"""The per-request state on the device: written for new requests, read and advanced by decode steps."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from light_tts.common.row_state import RowState


def write_rows(state: RowState, rows: Tensor, records: Tensor) -> None:
    """Do the same as `RowState.write`, which is the reference. rows: (any,) int32, all different or negative;
    records: (any, words of a record) int32"""
    words = records.shape[1]
    block = triton.next_power_of_2(words)
    _write_kernel[(len(rows),)](
        state.words, state.places, rows, records, WORDS=words, BLOCK=block, num_warps=4
    )


def advance(
    state: RowState, embedding: Tensor, schedule: Tensor, lines: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of one decode step, and count its tokens in `state.position`.

    embedding: (ids, hidden); schedule: (steps, batch) int32, each line contains distinct rows of the state,
    negative: batch padding; lines: (batch,) int64, the line for each token of the batch -> embeddings of the
    ids to feed (batch, hidden), zeros for negative rows; rows, and their lengths including this token,
    (batch,) int32, -1 and 0 for negative rows
    """
    batch, hidden = schedule.shape[1], embedding.shape[1]
    x = embedding.new_empty(batch, hidden)
    rows, lengths = (schedule.new_empty(batch) for _ in range(2))
    # Never overlapping: it starts after the previous step has ended, so later kernels may read that step's
    # state before they wait.
    _advance_kernel[(batch,)](
        state.next_id,
        state.position,
        embedding,
        schedule,
        lines,
        x,
        rows,
        lengths,
        HIDDEN=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        num_warps=4,
    )
    return x, rows, lengths


def advance_reference(
    state: RowState, embedding: Tensor, schedule: Tensor, lines: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = schedule.gather(0, lines[None])[0].clamp(min=-1)
    live = rows >= 0
    index = rows.clamp(min=0).long()
    x = embedding[state.next_id[index].where(live, 0).long()] * live[:, None]
    state.position[index[live]] += 1
    return x, rows, state.position[index].where(live, 0)


@triton.jit
def _write_kernel(words_ptr, places_ptr, rows_ptr, records_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row."""
    entry = tl.program_id(0)
    row = tl.load(rows_ptr + entry)
    i = tl.arange(0, BLOCK)
    live = (i < WORDS) & (row >= 0)
    first = tl.load(places_ptr + 2 * i, mask=live, other=0)
    distance = tl.load(places_ptr + 2 * i + 1, mask=live, other=0)
    tl.store(
        words_ptr + first + row * distance, tl.load(records_ptr + entry * WORDS + i, mask=live), mask=live
    )


@triton.jit
def _advance_kernel(
    next_id_ptr,
    position_ptr,
    embedding_ptr,
    schedule_ptr,
    lines_ptr,
    x_ptr,
    rows_ptr,
    lengths_ptr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token."""
    token = tl.program_id(0)
    batch = tl.num_programs(0)
    row = tl.load(schedule_ptr + tl.load(lines_ptr + token) * batch + token)
    live = row >= 0
    at = row.to(tl.int64)
    id = tl.load(next_id_ptr + at, mask=live, other=0).to(tl.int64)
    length = tl.load(position_ptr + at, mask=live, other=-1) + 1
    i = tl.arange(0, BLOCK)
    x = tl.load(embedding_ptr + id * HIDDEN + i, mask=(i < HIDDEN) & live, other=0.0)
    tl.store(x_ptr + token.to(tl.int64) * HIDDEN + i, x, mask=i < HIDDEN)
    tl.store(rows_ptr + token, tl.maximum(row, -1))
    tl.debug_barrier()  # all threads have read the position
    tl.store(position_ptr + at, length, mask=live)
    # Overlapping kernels read rows and lengths before they wait, so these must be visible when this one ends.
    tl.atomic_xchg(lengths_ptr + token, length, sem="release")
