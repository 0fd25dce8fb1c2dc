"""Self-attention within each sequence of a packed batch (see packed_conv.py), full or in chunks.

The buffer holds several copies of the batch (with and without guidance), all with the same layout. A program
looks up its work in `blocks`, so that one grid serves any mixture of lengths. A sequence may continue frames
that are not in the batch: their keys and values are in pages, and those of its own frames can be stored in
pages for later batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.launch import measured_for_rows

BLOCK_ENTRIES = 7
# of attention_of_rows, as in transformer_block.cu
ROW_ENTRIES = 8
LIST_ROWS, LIST_KEYS = 16, 32


@dataclass(frozen=True)
class Prefix:
    """The frames of a sequence that are in pages. past: its frames before those of the batch; pages: index of
    its first page in `CachedKeys.pages`; kept: its frames that are in pages afterwards, including `past`.
    Both are multiples of the page size."""

    past: int = 0
    pages: int = 0
    kept: int = 0


@dataclass(frozen=True)
class CachedKeys:
    """Cached keys and values of one layer. store: (pages, steps, copies, frames of a page, 2 * heads *
    head_dim), may be strided in the first three, keys first; pages: int32, the concatenated pages of all
    sequences; step: one int32 on the device."""

    store: Tensor
    pages: Tensor
    step: Tensor


def attention_blocks(
    lengths: Sequence[int],
    chunks: Sequence[int],
    block_rows: int,
    count: int,
    prefixes: Sequence[Prefix] | None = None,
) -> np.ndarray:
    """Return (count, BLOCK_ENTRIES) int32: for each block of queries its first position within the sequence,
    the sequence's first row, length and chunk (0: full attention), and its prefix; length 0 for unused
    blocks. Raises ValueError if `count` is too small."""
    found, first_row = [], 0
    prefixes = prefixes or [Prefix()] * len(lengths)
    for length, chunk, prefix in zip(lengths, chunks, prefixes, strict=True):
        rest = first_row, length, chunk, prefix.past, prefix.pages, prefix.kept
        found += [(start, *rest) for start in range(0, length, block_rows)]
        first_row += length
    if len(found) > count:
        raise ValueError(f"{len(found)} blocks of queries do not fit into {count}")
    blocks = np.zeros((count, BLOCK_ENTRIES), np.int32)
    # long sequences first, so that the last program to start ends soon
    blocks[: len(found)] = sorted(found, key=lambda block: -(block[2] + block[4]))
    return blocks


def attention_of_rows(
    lengths: Sequence[int], chunks: Sequence[int], count: int, prefixes: Sequence[Prefix] | None = None
) -> np.ndarray:
    """Return (count, ROW_ENTRIES) int32: what each row sees, for a kernel that attends with LIST_ROWS rows at
    a time, whichever sequences they belong to. Their keys form a list: of each of their sequences those that
    any of them sees, from a multiple of LIST_KEYS on. The entries of a row are

    start, end: the keys in that list that it sees;
    stop: the end of all keys of its sequence in it;
    next: the row with which the next sequence in it begins, 0: none;
    first: the row of its sequence's first key, if the past were in rows, too;
    past, pages, kept: its sequence's prefix;

    all 0 for unused rows. Raises ValueError if `count` is too small."""
    total = sum(lengths)
    if total > count:
        raise ValueError(f"{total} rows do not fit into {count}")
    parts, sizes = [], []  # rows of a sequence with the same list: their entries, chunk and length; how many
    row, start = 0, 0
    prefixes = prefixes or [Prefix()] * len(lengths)
    for length, chunk, prefix in zip(lengths, chunks, prefixes, strict=True):
        first_row, chunk = row, chunk or length
        first = first_row - prefix.past
        while row < first_row + length:
            end = min(row // LIST_ROWS * LIST_ROWS + LIST_ROWS, first_row + length)
            start = start if row % LIST_ROWS else 0
            stop = start + prefix.past + min(((end - 1 - first_row) // chunk + 1) * chunk, length)
            following = end if end % LIST_ROWS and end < total else 0
            rest = first, prefix.past, prefix.pages, prefix.kept, chunk, length
            parts.append((start, start, stop, following, *rest))
            sizes.append(end - row)
            row, start = end, -(-stop // LIST_KEYS) * LIST_KEYS
    entries = np.array(parts, np.int32).repeat(sizes, axis=0)
    pasts, every, most = entries[:, 5], entries[:, 8], entries[:, 9]
    position = np.arange(total) - entries[:, 4] - pasts
    entries[:, 1] += pasts + np.minimum((position // every + 1) * every, most)
    table = np.zeros((count, ROW_ENTRIES), np.int32)
    table[:total] = entries[:, :ROW_ENTRIES]
    return table


def packed_attention(
    qkv: Tensor,
    blocks: Tensor,
    out: Tensor,
    heads: int,
    block_rows: int,
    copies: int,
    cached: CachedKeys | None = None,
) -> Tensor:
    """qkv: (copies * rows, 3 * heads * head_dim); blocks: (n, BLOCK_ENTRIES) int32 from `attention_blocks`;
    out: (copies * rows, heads * head_dim). With chunk c, position i sees the positions before the end of its
    chunk, j < (i // c + 1) * c, and the whole past; `past` is a multiple of c. cached: None if no sequence
    has a prefix."""
    config = measured_for_rows(f"packed_attention_{block_rows}", qkv, len(qkv)) or {
        "BLOCK_KEYS": 64,
        "num_warps": 4 if block_rows <= 64 else 8,
        "num_stages": 3,
    }
    inner = out.shape[1]
    head_dim = inner // heads
    # tensors that are absent are never read, so any tensor can stand in for them
    store, pages, step = qkv, blocks, blocks
    if cached is not None:
        store, pages, step = cached.store, cached.pages, cached.step
    _packed_attention_kernel[(blocks.shape[0], heads, copies)](
        qkv,
        blocks,
        out,
        len(qkv) // copies,
        head_dim**-0.5 * 1.4426950408889634,  # for a softmax with powers of two
        store,
        pages,
        step,
        *((0, 0, 0) if cached is None else cached.store.stride()[:3]),
        WIDTH=inner,
        HEAD=head_dim,
        BLOCK_HEAD=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_ROWS=block_rows,
        KEPT=cached is not None,
        PAGE=1 if cached is None else store.shape[3],
        **config,
        **overlap.options(qkv.device, "packed_attention", len(qkv)),
    )
    return out


def packed_attention_reference(
    qkv: Tensor,
    blocks: Tensor,
    out: Tensor,
    heads: int,
    block_rows: int,
    copies: int,
    cached: CachedKeys | None = None,
) -> Tensor:
    for first, first_row, length, chunk, *prefix in blocks.tolist():
        if length == 0:
            continue
        query = torch.arange(first, min(first + block_rows, length), device=qkv.device)
        size = chunk or length
        seen = prefix[0] + ((query // size + 1) * size).clamp(max=length)
        _attend_reference(qkv, out, heads, copies, cached, first_row, query, seen, Prefix(*prefix))
    return out


def attention_of_rows_reference(
    qkv: Tensor, table: Tensor, out: Tensor, heads: int, copies: int, cached: CachedKeys | None = None
) -> Tensor:
    """As `packed_attention_reference`, with a table from `attention_of_rows`."""
    row = (table[:, 1] > 0).nonzero()[:, 0]
    table = table[row].long()
    first_rows = table[:, 4] + table[:, 5]
    for first_row in first_rows.unique().tolist():
        own = first_rows == first_row
        seen = table[own, 1] - table[own, 0]
        prefix = Prefix(*table[own][0, 5:].tolist())
        _attend_reference(qkv, out, heads, copies, cached, first_row, row[own] - first_row, seen, prefix)
    return out


def _attend_reference(
    qkv: Tensor,
    out: Tensor,
    heads: int,
    copies: int,
    cached: CachedKeys | None,
    first_row: int,
    query: Tensor,
    seen: Tensor,
    prefix: Prefix,
) -> None:
    """Attend with the positions `query` of the sequence that begins in `first_row`; seen: number of keys that
    each of them sees, including the past."""
    rows, width, count = len(out) // copies, out.shape[1], int(seen.max())
    masked = torch.arange(count, device=qkv.device) >= seen[:, None]
    for copy in range(copies):
        start = copy * rows + first_row
        own = qkv[start : start + count - prefix.past, width:]
        if cached is not None and prefix.past:
            own = torch.cat([_of_pages(cached, torch.arange(prefix.past), prefix.pages, copy), own])
        q = qkv[start + query, :width].float().view(len(query), heads, -1).transpose(0, 1)
        k, v = own.float().view(count, 2, heads, width // heads).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) * (width // heads) ** -0.5
        y = scores.masked_fill(masked, -torch.inf).softmax(-1) @ v
        out[start + query] = y.transpose(0, 1).flatten(1).to(out.dtype)
        frame = prefix.past + query
        frame = frame[frame < prefix.kept]
        if cached is not None and len(frame):
            size = cached.store.shape[3]
            page = cached.pages[prefix.pages + frame // size]
            cached.store[page.long(), int(cached.step), copy, frame % size] = own[frame]


def _of_pages(cached: CachedKeys, frames: Tensor, pages: int, copy: int) -> Tensor:
    """(frames, 2 * heads * head_dim)"""
    frames = frames.to(cached.pages.device)
    size = cached.store.shape[3]
    return cached.store[cached.pages[pages + frames // size].long(), int(cached.step), copy, frames % size]


@triton.jit
def _packed_attention_kernel(
    qkv_ptr,
    blocks_ptr,
    out_ptr,
    copy_rows,
    scale,
    store_ptr,
    pages_ptr,
    step_ptr,
    page_stride,
    step_stride,
    copy_stride,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    KEPT: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    entry = blocks_ptr + tl.program_id(0) * 7
    first = tl.load(entry)
    first_row = tl.load(entry + 1)
    length = tl.load(entry + 2)
    chunk = tl.load(entry + 3)
    head = tl.program_id(1)
    if length == 0:
        return
    if KEPT:
        past = tl.load(entry + 4)
        pages_ptr += tl.load(entry + 5)
        kept_end = tl.load(entry + 6)
    feature = tl.arange(0, BLOCK_HEAD)
    column = head * HEAD + feature
    known = feature < HEAD
    if OVERLAP:
        overlap.begin()
    base = tl.program_id(2) * copy_rows + first_row
    query = first + tl.arange(0, BLOCK_ROWS)
    inside = (query < length)[:, None] & known[None, :]
    own = (base + query)[:, None] * (3 * WIDTH) + column[None, :]
    q = tl.load(qkv_ptr + own, mask=inside, other=0.0)
    chunk_size = tl.where(chunk > 0, chunk, length)
    query_end = tl.minimum((query // chunk_size + 1) * chunk_size, length)
    end = tl.minimum(((first + BLOCK_ROWS - 1) // chunk_size + 1) * chunk_size, length)
    highest = tl.full((BLOCK_ROWS,), -1.0e30, dtype=tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_HEAD), dtype=tl.float32)
    if KEPT:
        # `step` is read after the wait: without a graph, the previous kernel may have written it
        store_ptr += (
            tl.load(step_ptr).to(tl.int64) * step_stride + tl.program_id(2).to(tl.int64) * copy_stride
        )
        for start in range(0, past, BLOCK_KEYS):
            key = start + tl.arange(0, BLOCK_KEYS)
            page = tl.load(pages_ptr + key // PAGE, mask=key < past, other=0).to(tl.int64)
            at = page * page_stride + key % PAGE * (2 * WIDTH)
            k = tl.load(
                store_ptr + at[None, :] + column[:, None],
                mask=(key < past)[None, :] & known[:, None],
                other=0.0,
            )
            v = tl.load(
                store_ptr + WIDTH + at[:, None] + column[None, :],
                mask=(key < past)[:, None] & known[None, :],
                other=0.0,
            )
            seen = (key < past)[None, :] & (query >= 0)[:, None]
            highest, mass, total = _attend(q, k, v, seen, scale, highest, mass, total)
    for start in range(0, end, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        at = (base + key) * (3 * WIDTH)
        k = tl.load(
            qkv_ptr + WIDTH + at[None, :] + column[:, None],
            mask=(key < length)[None, :] & known[:, None],
            other=0.0,
        )
        v = tl.load(
            qkv_ptr + 2 * WIDTH + at[:, None] + column[None, :],
            mask=(key < length)[:, None] & known[None, :],
            other=0.0,
        )
        seen = key[None, :] < query_end[:, None]
        highest, mass, total = _attend(q, k, v, seen, scale, highest, mass, total)
    attended = (total / mass[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (base + query)[:, None] * WIDTH + column[None, :], attended, mask=inside)
    if KEPT:
        frame = past + query
        if past + first < kept_end:
            stays = inside & (frame < kept_end)[:, None]
            page = tl.load(pages_ptr + frame // PAGE, mask=frame < kept_end, other=0).to(tl.int64)
            at = (page * page_stride + frame % PAGE * (2 * WIDTH))[:, None] + column[None, :]
            tl.store(store_ptr + at, tl.load(qkv_ptr + WIDTH + own, mask=stays, other=0.0), mask=stays)
            tl.store(
                store_ptr + WIDTH + at, tl.load(qkv_ptr + 2 * WIDTH + own, mask=stays, other=0.0), mask=stays
            )


@triton.jit
def _attend(q, k, v, seen, scale, highest, mass, total):
    """Update highest score, mass and weighted sum with a tile of keys, where `seen`."""
    return attend(tl.dot(q, k, input_precision="ieee") * scale, v, seen, highest, mass, total)


@triton.jit
def attend(scores, v, seen, highest, mass, total):
    """Update highest score, mass and weighted sum with the scores of a tile of keys, where `seen`. scores:
    logarithms to base 2."""
    scores = tl.where(seen, scores, -1.0e30)
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_highest[:, None])
    fade = tl.exp2(highest - new_highest)
    mass = mass * fade + tl.sum(weights, axis=1)
    total = tl.dot(weights.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
    return new_highest, mass, total
