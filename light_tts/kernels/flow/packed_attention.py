"""Self-attention inside each sequence of a packed batch (see packed_conv.py), full or in chunks.

The batch stands in the buffer several times (with and without guidance), each copy with the same layout.
What a program does is looked up in `blocks`, so that one grid serves every mixture of lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.launch import geometry


def attention_blocks(
    lengths: Sequence[int], chunks: Sequence[int], block_rows: int, count: int
) -> np.ndarray:
    """(count, 4) int32: for each block of queries its first position in the sequence, the sequence's first
    row, length and chunk (0: full attention); length 0 where there is nothing left to do.
    Raises ValueError when `count` is too small."""
    found, first_row = [], 0
    for length, chunk in zip(lengths, chunks, strict=True):
        found += [(start, first_row, length, chunk) for start in range(0, length, block_rows)]
        first_row += length
    if len(found) > count:
        raise ValueError(f"{len(found)} blocks of queries do not fit into {count}")
    blocks = np.zeros((count, 4), np.int32)
    # long sequences first: what starts last should end soon
    blocks[: len(found)] = sorted(found, key=lambda block: -block[2])
    return blocks


def packed_attention(
    qkv: Tensor, blocks: Tensor, out: Tensor, heads: int, block_rows: int, copies: int
) -> Tensor:
    """qkv: (copies * rows, 3 * heads * head_dim); blocks: (n, 4) int32 from `attention_blocks`;
    out: (copies * rows, heads * head_dim). With chunk c, position i sees the positions before the end of its
    chunk, j < (i // c + 1) * c."""
    width = out.shape[1]
    head_dim = width // heads
    shape = geometry(f"packed_attention_{block_rows}", qkv, len(qkv)) or {
        "BLOCK_KEYS": 64,
        "num_warps": 4 if block_rows <= 64 else 8,
        "num_stages": 3,
    }
    _attention[(blocks.shape[0], heads, copies)](
        qkv,
        blocks,
        out,
        out.shape[0] // copies,
        head_dim**-0.5 * 1.4426950408889634,  # softmax in powers of two
        WIDTH=width,
        HEAD=head_dim,
        BLOCK_HEAD=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_ROWS=block_rows,
        **shape,
        **overlap.options(qkv.device, "packed_attention", len(qkv)),
    )
    return out


def packed_attention_reference(
    qkv: Tensor, blocks: Tensor, out: Tensor, heads: int, block_rows: int, copies: int
) -> Tensor:
    rows, width = out.shape[0] // copies, out.shape[1]
    for first, first_row, length, chunk in blocks.tolist():
        if length == 0:
            continue
        query = torch.arange(first, min(first + block_rows, length), device=qkv.device)
        for copy in range(copies):
            span = slice(copy * rows + first_row, copy * rows + first_row + length)
            q, k, v = qkv[span].float().view(length, 3, heads, width // heads).permute(1, 2, 0, 3)
            scores = q[:, query] @ k.transpose(1, 2) * (width // heads) ** -0.5
            if chunk:
                keys = torch.arange(length, device=qkv.device)
                seen = keys < ((query // chunk + 1) * chunk)[:, None]
                scores = scores.masked_fill(~seen, -torch.inf)
            y = scores.softmax(-1) @ v
            out[copy * rows + first_row + query] = y.transpose(0, 1).flatten(1).to(out.dtype)
    return out


@triton.jit
def _attention(
    qkv,
    blocks,
    out,
    copy_rows,
    scale,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    entry = blocks + tl.program_id(0) * 4
    first = tl.load(entry)
    first_row = tl.load(entry + 1)
    length = tl.load(entry + 2)
    chunk = tl.load(entry + 3)
    if length == 0:
        return
    if OVERLAP:
        overlap.begin()
    base = tl.program_id(2) * copy_rows + first_row
    feature = tl.arange(0, BLOCK_HEAD)
    column = tl.program_id(1) * HEAD + feature
    query = first + tl.arange(0, BLOCK_ROWS)
    q = tl.load(
        qkv + (base + query)[:, None] * (3 * WIDTH) + column[None, :],
        mask=(query < length)[:, None] & (feature < HEAD)[None, :],
        other=0.0,
    )
    chunk_size = tl.where(chunk > 0, chunk, length)
    query_end = tl.minimum((query // chunk_size + 1) * chunk_size, length)
    end = tl.minimum(((first + BLOCK_ROWS - 1) // chunk_size + 1) * chunk_size, length)
    highest = tl.full((BLOCK_ROWS,), -1.0e30, dtype=tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_HEAD), dtype=tl.float32)
    for start in range(0, end, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        at = (base + key) * (3 * WIDTH)
        k = tl.load(
            qkv + WIDTH + at[None, :] + column[:, None],
            mask=(key < length)[None, :] & (feature < HEAD)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(key[None, :] < query_end[:, None], scores, -1.0e30)
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        fade = tl.exp2(highest - new_highest)
        mass = mass * fade + tl.sum(weights, axis=1)
        v = tl.load(
            qkv + 2 * WIDTH + at[:, None] + column[None, :],
            mask=(key < length)[:, None] & (feature < HEAD)[None, :],
            other=0.0,
        )
        total = tl.dot(weights.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
        highest = new_highest
    tl.store(
        out + (base + query)[:, None] * WIDTH + column[None, :],
        (total / mass[:, None]).to(out.dtype.element_ty),
        mask=(query < length)[:, None] & (feature < HEAD)[None, :],
    )
