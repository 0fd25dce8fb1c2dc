"""Causal attention of many new tokens per request over the KV pool, which already holds these and earlier
ones: flash attention over a batch without padding."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.common.kv_pool import LayerPool
from light_tts.kernels.llm.pool_read import load_tokens, read_reference

QUERY_BLOCK = 64  # new tokens per program
_KEY_BLOCK = 64
_LOG2_E = math.log2(math.e)


def prefill_blocks(lengths: list[int]) -> list[tuple[int, int]]:
    """Return the programs for spans of these lengths: (span, first token of the block within it). May be
    padded with (-1, 0)."""
    return [(span, first) for span, n in enumerate(lengths) for first in range(0, n, QUERY_BLOCK)]


def prefill_attention(
    q: Tensor,
    pool: LayerPool,
    table: Tensor,
    rows: Tensor,
    starts: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    blocks: Tensor,
) -> Tensor:
    """Span s covers the positions [starts[s], starts[s] + lengths[s]) of table row rows[s]; its tokens are
    q[offsets[s] : offsets[s] + lengths[s]]. Each token attends to all positions up to its own.

    q, pool and table as in `rotary_kv_write`; rows, starts, lengths, offsets: (spans,) int32; blocks:
    (programs, 2) int32, see `prefill_blocks` -> like q, undefined for tokens in no
    block
    """
    k, v, k_scale, v_scale = pool
    out = torch.empty_like(q)
    _, heads, head_dim = q.shape
    _prefill_kernel[(heads, blocks.shape[0])](
        q,
        k,
        v,
        k_scale,
        v_scale,
        table,
        rows,
        starts,
        lengths,
        offsets,
        blocks,
        out,
        head_dim**-0.5 * _LOG2_E,
        table.shape[1],
        k.shape[1],
        GROUP=heads // k.shape[1],
        HEAD_DIM=head_dim,
        QUERIES=QUERY_BLOCK,
        KEYS=_KEY_BLOCK,
        INT8=k.dtype == torch.int8,
        num_warps=4 if q.element_size() == 2 else 8,  # float32 needs the registers
        num_stages=2,
    )
    return out


def prefill_attention_reference(
    q: Tensor,
    pool: LayerPool,
    table: Tensor,
    rows: Tensor,
    starts: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    blocks: Tensor,
) -> Tensor:
    k, v, k_scale, v_scale = pool
    out = torch.zeros_like(q)
    spans = torch.stack([rows, starts, lengths, offsets], 1).tolist()
    for span in sorted({span for span, _ in blocks.tolist() if span >= 0}):
        row, start, length, offset = spans[span]
        keys = read_reference(k, k_scale, table[row, : start + length], q.dtype)
        values = read_reference(v, v_scale, table[row, : start + length], q.dtype)
        queries = q[offset : offset + length].float().unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("nghd,lgd->ghnl", queries, keys) * q.shape[-1] ** -0.5
        later = torch.ones(length, start + length, dtype=torch.bool, device=q.device).triu(start + 1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        out[offset : offset + length] = torch.einsum("ghnl,lgd->nghd", weights, values).flatten(1, 2)
    return out


@triton.jit
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    rows_ptr,
    starts_ptr,
    lengths_ptr,
    offsets_ptr,
    blocks_ptr,
    out_ptr,
    scale,
    max_len,
    kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    INT8: tl.constexpr,
):
    """One program per head and block of queries; `scale`: includes log2(e), because powers of two are
    used.
    """
    head = tl.program_id(0)
    block = tl.program_id(1)
    span = tl.load(blocks_ptr + 2 * block)
    if span >= 0:
        first = tl.load(blocks_ptr + 2 * block + 1)
        start = tl.load(starts_ptr + span)
        length = tl.load(lengths_ptr + span)
        slots_ptr = table_ptr + tl.load(rows_ptr + span).to(tl.int64) * max_len
        dtype = q_ptr.dtype.element_ty

        query = first + tl.arange(0, QUERIES)
        exists = (query < length)[:, None]
        token = (tl.load(offsets_ptr + span) + query).to(tl.int64)
        offset = (token[:, None] * tl.num_programs(0) + head) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        q = tl.load(q_ptr + offset, mask=exists, other=0.0)

        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mean = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
        end = start + tl.minimum(first + QUERIES, length)
        for key_start in range(0, end, KEYS):
            position = key_start + tl.arange(0, KEYS)
            inside = position < end
            slots = tl.load(slots_ptr + position, mask=inside, other=0).to(tl.int64)
            k = load_tokens(k_ptr, k_scale_ptr, slots, inside, head // GROUP, kv_heads, HEAD_DIM, INT8, dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            seen = position[None, :] <= (start + query)[:, None]
            scores = tl.where(seen, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            v = load_tokens(v_ptr, v_scale_ptr, slots, inside, head // GROUP, kv_heads, HEAD_DIM, INT8, dtype)
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink[:, None] + tl.dot(weights.to(dtype), v, input_precision="ieee")
            largest = new_largest
        tl.store(out_ptr + offset, (mean / total[:, None]).to(dtype), mask=exists)
