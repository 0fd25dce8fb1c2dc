"""Attention of one new token per request over the KV pool: flash decoding, split along the sequence. The same
kernel rotates q and k and writes k and v to the pool.

All query heads that share a kv head are processed by one program, so K and V are read once. A row is cut
every `split` positions; the last program to finish combines the parts. The time is dominated by a chain of
dependent loads (row, slots, K and V), so K, V and slots are loaded one or two tiles ahead of their use.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.common.kv_pool import LayerPool
from light_tts.kernels import arrival, configs, overlap
from light_tts.kernels.arrival import is_last
from light_tts.kernels.launch import Config, measured_up_to
from light_tts.kernels.llm.pool_read import load_tokens, read_reference
from light_tts.kernels.llm.rotary import Rope, quantized, rotary_kv_write_reference, scale_of

_LOG2_E = math.log2(math.e)
_PROGRAMS = 256  # approximate number that fills a GPU
_BLOCK = 64


@cache
def decode_config(device: torch.device, dtype: torch.dtype, groups: int, max_length: int) -> Config:
    """Return the configuration for `groups` (tokens x kv heads) of up to `max_length` positions. SPLIT:
    positions per program, in tiles of BLOCK, which divides it. The result is shared: do not modify it."""
    entries = configs.entries("decode_attention", device, dtype)
    found = measured_up_to(entries, groups=groups, max_length=max_length)
    if found is not None:
        return found
    split = triton.next_power_of_2(triton.cdiv(max_length * groups, _PROGRAMS))
    return {"BLOCK": _BLOCK, "SPLIT": min(max(split, _BLOCK), 512), "num_warps": 4}


def decode_attention(
    qkv: Tensor,
    rope: Rope,
    pool: LayerPool,
    table: Tensor,
    rows: Tensor,
    lengths: Tensor,
    max_length: int,
    config: Config | None = None,
) -> Tensor:
    """Write token i, at position lengths[i] - 1 of table row rows[i], to the pool, and let it attend to all
    positions up to its own; one of length 0 (batch padding) gets zeros.

    qkv, rope, pool: as in `rotary_kv_write`, head_dim a power of two from 16; table: (rows, max_len) int32
    slots; rows, lengths: (tokens,) int32; max_length: upper bound of all lengths, which determines the grid;
    config: None for the measured one -> (tokens, heads, head_dim). With overlapping kernels, table, rows,
    lengths and the older tokens of the pool must not be written by the previous kernel.
    """
    (cos, sin), (k, v, k_scale, v_scale) = rope, pool
    tokens, size = qkv.shape
    kv_heads, head_dim = k.shape[1:]
    heads = size // head_dim - 2 * kv_heads
    group = heads // kv_heads
    if tokens * kv_heads > arrival.COUNTERS:
        raise ValueError(f"decode_attention: {tokens} tokens of {kv_heads} kv heads are too many")
    config = config or decode_config(qkv.device, qkv.dtype, tokens * kv_heads, max_length)
    splits = triton.cdiv(max_length, config["SPLIT"])
    partial = qkv.new_empty(tokens * heads * splits * head_dim, dtype=torch.float32)
    partial_lse = qkv.new_empty(tokens * heads * splits, dtype=torch.float32)
    out = qkv.new_empty(tokens, heads, head_dim)
    _decode_kernel[(splits, kv_heads, tokens)](
        qkv,
        cos,
        sin,
        k,
        v,
        k_scale,
        v_scale,
        table,
        rows,
        lengths,
        out,
        partial,
        partial_lse,
        arrival.counters(qkv.device),
        head_dim**-0.5 * _LOG2_E,
        table.shape[1],
        GROUP=group,
        HEADS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        CHUNK=8,
        INT8=k.dtype == torch.int8,
        TINY=torch.finfo(qkv.dtype).tiny,
        num_stages=1,
        **config,
        **overlap.options(qkv.device, "llm", tokens),
    )
    return out


def decode_attention_reference(
    qkv: Tensor,
    rope: Rope,
    pool: LayerPool,
    table: Tensor,
    rows: Tensor,
    lengths: Tensor,
    max_length: int,
    config: Config | None = None,
) -> Tensor:
    positions = (lengths - 1).clamp(min=0)
    slots = table[rows.clamp(min=0).long(), positions.long()].where(lengths > 0, -1)
    q = rotary_kv_write_reference(qkv, rope, positions, slots, pool)
    k, v, k_scale, v_scale = pool
    out = torch.zeros_like(q)
    for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        if length:
            keys = read_reference(k, k_scale, table[row, :length], q.dtype)
            values = read_reference(v, v_scale, table[row, :length], q.dtype)
            scores = torch.einsum("ghd,lgd->ghl", q[i].float().unflatten(0, (k.shape[1], -1)), keys)
            weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
            out[i] = torch.einsum("ghl,lgd->ghd", weights, values).flatten(0, 1)
    return out


@triton.jit
def _decode_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    rows_ptr,
    lengths_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    counters_ptr,
    scale,
    max_len,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    INT8: tl.constexpr,
    TINY: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """One program per split, kv head and token. `HEADS`: the GROUP query heads of a kv head, rounded up;
    `scale`: includes log2(e), because powers of two are used; `CHUNK`: number of parts combined at a time."""
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    token = tl.program_id(2)
    kv_heads = tl.num_programs(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype = qkv_ptr.dtype.element_ty
    # .cg: with overlapping kernels, the L1 cache may hold data of the previous step.
    length = tl.load(lengths_ptr + token, cache_modifier=".cg")
    row = tl.maximum(tl.load(rows_ptr + token, cache_modifier=".cg"), 0).to(tl.int64)
    slots_ptr = table_ptr + row * max_len
    first = split * SPLIT
    end = tl.minimum(first + SPLIT, length)
    written = tl.minimum(end, length - 1)  # the earlier tokens are in the pool
    position = first + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + position, mask=position < max_len, other=0, cache_modifier=".cg")
    if SPLIT > BLOCK:
        later = position + BLOCK
        next_slots = tl.load(slots_ptr + later, mask=later < max_len, other=0, cache_modifier=".cg")
    k = load_tokens(k_ptr, k_scale_ptr, slots, position < written, kv_head, kv_heads, HEAD_DIM, INT8, dtype)
    v = load_tokens(v_ptr, v_scale_ptr, slots, position < written, kv_head, kv_heads, HEAD_DIM, INT8, dtype)
    # Rotation: x * cos + (the other half of x) * sin, with negative sine in the first half.
    i = tl.arange(0, HEAD_DIM)
    newest = tl.maximum(length - 1, 0)
    angle = newest.to(tl.int64) * HALF + i % HALF
    cos = tl.load(cos_ptr + angle)[None, :]
    sin = (tl.load(sin_ptr + angle) * tl.where(i < HALF, -1.0, 1.0))[None, :]
    index = tl.load(slots_ptr + newest).to(tl.int64) * kv_heads + kv_head
    if OVERLAP:
        overlap.begin()

    group = (token * kv_heads + kv_head).to(tl.int64)
    head = tl.arange(0, HEADS)
    exists = (head < GROUP)[:, None]
    offset = group * GROUP * HEAD_DIM + head[:, None] * HEAD_DIM + i[None, :]
    if first < length:
        x_ptr = qkv_ptr + token.to(tl.int64) * kv_heads * (GROUP + 2) * HEAD_DIM
        q_ptrs = x_ptr + (kv_head * GROUP + head[:, None]) * HEAD_DIM
        k_ptrs = x_ptr + (kv_heads * GROUP + kv_head) * HEAD_DIM
        here, other = i[None, :], ((i + HALF) % HEAD_DIM)[None, :]
        q = tl.load(q_ptrs + here, mask=exists, other=0.0).to(tl.float32) * cos
        q = (q + tl.load(q_ptrs + other, mask=exists, other=0.0).to(tl.float32) * sin).to(dtype)
        new_k = tl.load(k_ptrs + here).to(tl.float32) * cos
        new_k = (new_k + tl.load(k_ptrs + other).to(tl.float32) * sin).to(dtype)
        new_v = tl.load(k_ptrs + kv_heads * HEAD_DIM + here)
        last = end == length
        if INT8:
            new_k, k_scale = _stored(new_k, dtype, TINY)
            new_v, v_scale = _stored(new_v, dtype, TINY)
            tl.store(k_scale_ptr + index + tl.arange(0, 1), k_scale, mask=last)
            tl.store(v_scale_ptr + index + tl.arange(0, 1), v_scale, mask=last)
        tl.store(k_ptr + index * HEAD_DIM + here, new_k, mask=last)
        tl.store(v_ptr + index * HEAD_DIM + here, new_v, mask=last)
        if INT8:
            new_k = new_k.to(dtype) * k_scale[:, None]
            new_v = new_v.to(dtype) * v_scale[:, None]

        largest = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        mean = tl.zeros([HEADS, HEAD_DIM], tl.float32)
        for start in range(first, end, BLOCK):
            position = start + tl.arange(0, BLOCK)
            if SPLIT > BLOCK:
                later = position + BLOCK
                old = later < written
                next_k = load_tokens(
                    k_ptr, k_scale_ptr, next_slots, old, kv_head, kv_heads, HEAD_DIM, INT8, dtype
                )
                next_v = load_tokens(
                    v_ptr, v_scale_ptr, next_slots, old, kv_head, kv_heads, HEAD_DIM, INT8, dtype
                )
                later += BLOCK
                next_slots = tl.load(slots_ptr + later, mask=later < max_len, other=0)
            is_new = (position == length - 1)[:, None]
            k = tl.where(is_new, new_k, k)
            v = tl.where(is_new, new_v, v)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where((position < end)[None, :], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink[:, None] + tl.dot(weights.to(dtype), v, input_precision="ieee")
            largest = new_largest
            if SPLIT > BLOCK:
                k = next_k
                v = next_v
        mean = mean / total[:, None]

        active = tl.cdiv(length, SPLIT)
        if active == 1:
            tl.store(out_ptr + offset, mean.to(dtype), mask=exists)
        else:
            lse_ptr = partial_lse_ptr + group * tl.num_programs(0) * GROUP + head
            part_ptr = partial_ptr + group * tl.num_programs(0) * GROUP * HEAD_DIM
            part_ptr = part_ptr + head[:, None] * HEAD_DIM + i[None, :]
            tl.store(part_ptr + split * GROUP * HEAD_DIM, mean, mask=exists)
            tl.store(lse_ptr + split * GROUP, largest + tl.log2(total), mask=head < GROUP)
            if is_last(counters_ptr + group, active):
                largest = tl.full([HEADS], float("-inf"), tl.float32)
                total = tl.zeros([HEADS], tl.float32)
                mean = tl.zeros([HEADS, HEAD_DIM], tl.float32)
                for start in range(0, active, CHUNK):
                    part = (start + tl.arange(0, CHUNK))[:, None]
                    mask = (part < active) & (head < GROUP)[None, :]
                    lse = tl.load(lse_ptr[None, :] + part * GROUP, mask=mask, other=0.0, cache_modifier=".cg")
                    means = tl.load(
                        part_ptr[None, :, :] + part[:, :, None] * GROUP * HEAD_DIM,
                        mask=mask[:, :, None],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    lse = tl.where(part < active, lse, float("-inf"))
                    new_largest = tl.maximum(largest, tl.max(lse, 0))
                    share = tl.exp2(lse - new_largest[None, :])
                    shrink = tl.exp2(largest - new_largest)
                    total = total * shrink + tl.sum(share, 0)
                    mean = mean * shrink[:, None] + tl.sum(share[:, :, None] * means, 0)
                    largest = new_largest
                mean = mean / total[:, None]
                tl.store(out_ptr + offset, mean.to(dtype), mask=exists)
    else:
        if split == 0:
            tl.store(out_ptr + offset, tl.zeros([HEADS, HEAD_DIM], dtype), mask=exists)


@triton.jit
def _stored(x, dtype: tl.constexpr, TINY: tl.constexpr):
    """x: (heads, n) -> the pool's representation: int8 (heads, n), scale (heads,)"""
    scale = scale_of(tl.max(tl.abs(x.to(tl.float32)), 1), dtype, TINY)
    return quantized(x, scale), scale
