"""Self-attention with relative positions (Dai et al. 2019, section 3.3) over the padded items of the flow's
encoder, full or in chunks.

The score of query i and key j has a product with the position of their distance i - j. A program multiplies
its queries with the positions of all distances between them and a tile of keys, and then picks for each pair
the one it needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.flow.packed_attention import attend
from light_tts.kernels.launch import measured_for_rows


def relative_attention(
    qkv: Tensor, positions: Tensor, biases: Tensor, items: Tensor, out: Tensor, heads: int
) -> Tensor:
    """Scores are ((q_i + u) k_j + (q_i + v) p_{i-j}) / sqrt(head_dim). qkv: (items * size, 3 * heads *
    head_dim); positions: (2 * n - 1, heads * head_dim) with n >= size, p of the distances n-1 ... -(n-1);
    biases: (2, heads * head_dim) float32, u and v; items: (items, 2) int32, rows may be strided, length and
    chunk (0: full attention); out: (items * size, heads * head_dim), rows from an item's length on are
    skipped. With chunk c, position i sees the positions j < (i // c + 1) * c."""
    size = len(qkv) // len(items)
    config = measured_for_rows("relative_attention", qkv, len(qkv)) or {
        "BLOCK_ROWS": 16 if len(qkv) <= 256 else 32,
        "BLOCK_KEYS": 64,
        "num_warps": 4,
        "num_stages": 3 if qkv.element_size() == 2 else 1,  # limited by shared memory
    }
    inner = out.shape[1]
    head_dim = inner // heads
    pairs = config["BLOCK_ROWS"] + config["BLOCK_KEYS"] - 1
    blocks = triton.cdiv(size, config["BLOCK_ROWS"])
    _relative_attention_kernel[(blocks, heads, len(items))](
        qkv,
        positions,
        biases,
        items,
        items.stride(0),
        out,
        size,
        len(positions) // 2,
        head_dim**-0.5 * 1.4426950408889634,  # for a softmax with powers of two
        WIDTH=inner,
        HEAD=head_dim,
        BLOCK_HEAD=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_DISTANCES=triton.next_power_of_2(pairs),
        **config,
        **overlap.options(qkv.device, "relative_attention", len(qkv)),
    )
    return out


def relative_attention_reference(
    qkv: Tensor, positions: Tensor, biases: Tensor, items: Tensor, out: Tensor, heads: int
) -> Tensor:
    size, inner = len(qkv) // len(items), out.shape[1]
    zero = len(positions) // 2
    u, v_bias = biases.view(2, heads, 1, -1)
    p = positions.float().view(len(positions), heads, -1).transpose(0, 1)
    for item, (length, chunk) in enumerate(items.tolist()):
        own = slice(item * size, item * size + length)
        q, k, v = qkv[own].float().view(length, 3, heads, inner // heads).permute(1, 2, 0, 3)
        place = torch.arange(length, device=qkv.device)
        distance = place[:, None] - place
        by_distance = (q + v_bias) @ p.transpose(1, 2)
        scores = (q + u) @ k.transpose(1, 2)
        scores = scores + by_distance.gather(2, (zero - distance).expand(heads, -1, -1))
        if chunk:
            scores = scores.masked_fill(place >= (place // chunk + 1)[:, None] * chunk, -torch.inf)
        y = (scores * (inner // heads) ** -0.5).softmax(-1) @ v
        out[own] = y.transpose(0, 1).flatten(1).to(out.dtype)
    return out


@triton.jit
def _relative_attention_kernel(
    qkv_ptr,
    positions_ptr,
    biases_ptr,
    items_ptr,
    items_stride,
    out_ptr,
    size,
    zero,
    scale,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_DISTANCES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """zero: the row of `positions` of distance 0."""
    first = tl.program_id(0) * BLOCK_ROWS
    head = tl.program_id(1)
    item = tl.program_id(2)
    length = tl.load(items_ptr + item * items_stride)
    chunk = tl.load(items_ptr + item * items_stride + 1)
    if first >= length:
        return
    feature = tl.arange(0, BLOCK_HEAD)
    column = head * HEAD + feature
    known = feature < HEAD
    u = tl.load(biases_ptr + column, mask=known, other=0.0)
    v_bias = tl.load(biases_ptr + WIDTH + column, mask=known, other=0.0)
    if OVERLAP:
        overlap.begin()
    base = item * size
    query = first + tl.arange(0, BLOCK_ROWS)
    inside = (query < length)[:, None] & known[None, :]
    q = tl.load(qkv_ptr + (base + query)[:, None] * (3 * WIDTH) + column[None, :], mask=inside, other=0.0)
    with_u = (q.to(tl.float32) + u[None, :]).to(q.dtype)
    with_v = (q.to(tl.float32) + v_bias[None, :]).to(q.dtype)
    chunk_size = tl.where(chunk > 0, chunk, length)
    query_end = tl.minimum((query // chunk_size + 1) * chunk_size, length)
    end = tl.minimum(((first + BLOCK_ROWS - 1) // chunk_size + 1) * chunk_size, length)
    highest = tl.full((BLOCK_ROWS,), -1.0e30, dtype=tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_HEAD), dtype=tl.float32)
    # of a query and a key: the column of their distance, counted from that of the first query and last key
    pick = tl.arange(0, BLOCK_ROWS)[:, None] + (BLOCK_KEYS - 1 - tl.arange(0, BLOCK_KEYS))[None, :]
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
        distance = first - (start + BLOCK_KEYS - 1) + tl.arange(0, BLOCK_DISTANCES)
        near = (distance <= zero) & (distance >= -zero)
        p = tl.load(
            positions_ptr + (zero - distance)[None, :] * WIDTH + column[:, None],
            mask=near[None, :] & known[:, None],
            other=0.0,
        )
        by_distance = tl.dot(with_v, p, input_precision="ieee")
        scores = tl.dot(with_u, k, input_precision="ieee") + tl.gather(by_distance, pick, 1)
        seen = key[None, :] < query_end[:, None]
        highest, mass, total = attend(scores * scale, v, seen, highest, mass, total)
    attended = (total / mass[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (base + query)[:, None] * WIDTH + column[None, :], attended, mask=inside)
