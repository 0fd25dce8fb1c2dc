"""Attention of one new token a request over the KV pool: flash decoding, split along the sequence.

All query heads that share a kv head are one program's, so K and V are read once. A row is cut every
`split` positions, whoever else is in the batch; the last program to arrive joins the parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import arrival, configs, overlap
from light_tts.kernels.arrival import is_last

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class DecodeConfig:
    """`split`: positions of one program, in tiles of `block`, which divides it."""

    block: int = 64
    split: int = 128
    warps: int = 4
    stages: int = 2


@cache
def decode_config(device: torch.device, max_length: int) -> DecodeConfig:
    """What was measured to be fastest for rows of up to `max_length` positions on this GPU."""
    entries = configs.load(device).get("decode_attention", [])
    fitting = [entry for entry in entries if entry["max_length"] >= max_length] or entries[-1:]
    if not fitting:
        return DecodeConfig(split=128 if max_length <= 2048 else 256)
    return DecodeConfig(**{name: fitting[0][name] for name in DecodeConfig.__dataclass_fields__})


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    table: Tensor,
    rows: Tensor,
    lengths: Tensor,
    max_length: int,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Token i attends to the first lengths[i] positions of table row rows[i], its own included; one of
    length 0 (which only fills up the batch) gets zeros.

    q: (tokens, heads, head_dim), head_dim a power of two from 16; k, v, k_scale, v_scale: one layer of the
    pool, as in `rotary_kv_write`; table: (rows, max_len) int32 slots; rows, lengths: (tokens,) int32;
    max_length: bound of all lengths, which fixes the grid; config: None for the measured one -> like q"""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    config = config or decode_config(q.device, max_length)
    if tokens * kv_heads > arrival.COUNTERS:
        raise ValueError(f"decode_attention: {tokens} tokens of {kv_heads} kv heads are too many")
    splits = triton.cdiv(max_length, config.split)
    partial = q.new_empty(tokens * heads * splits * head_dim, dtype=torch.float32)
    partial_lse = q.new_empty(tokens * heads * splits, dtype=torch.float32)
    out = torch.empty_like(q)
    _decode_kernel[(splits, kv_heads, tokens)](
        q,
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
        arrival.counters(q.device),
        head_dim**-0.5 * _LOG2_E,
        table.shape[1],
        GROUP=group,
        HEADS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK=config.block,
        SPLIT=config.split,
        CHUNK=8,
        INT8=k.dtype == torch.int8,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap.options(q.device),
    )
    return out


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    table: Tensor,
    rows: Tensor,
    lengths: Tensor,
    max_length: int,
    config: DecodeConfig | None = None,
) -> Tensor:
    out = torch.zeros_like(q)
    for i, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        if length:
            keys = read_reference(k, k_scale, table[row, :length], q.dtype)
            values = read_reference(v, v_scale, table[row, :length], q.dtype)
            scores = torch.einsum("ghd,lgd->ghl", q[i].float().unflatten(0, (k.shape[1], -1)), keys)
            weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
            out[i] = torch.einsum("ghl,lgd->ghd", weights, values).flatten(0, 1)
    return out


def read_reference(pool: Tensor, scales: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """-> (slots, kv_heads, head_dim) float32, what `KVPool.read` gives in `dtype`"""
    x = pool[slots.long()].to(dtype)
    return (x if scales is None else x * scales[slots.long(), :, None]).float()


@triton.jit
def load_tokens(
    pool_ptr,
    scale_ptr,
    slots,
    exists,
    kv_head,
    kv_heads,
    HEAD_DIM: tl.constexpr,
    INT8: tl.constexpr,
    dtype: tl.constexpr,
):
    """One head of the tokens in `slots`, (tokens,) int64. -> (tokens, HEAD_DIM) of `dtype`, zero where not
    `exists`"""
    index = slots * kv_heads + kv_head
    pointers = pool_ptr + index[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    x = tl.load(pointers, mask=exists[:, None], other=0)
    if INT8:
        x = x.to(dtype) * tl.load(scale_ptr + index, mask=exists, other=0.0)[:, None]
    return x


@triton.jit
def _decode_kernel(
    q_ptr,
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
    OVERLAP: tl.constexpr = False,
):
    """One program a split, kv head and token. `HEADS`: the GROUP query heads of a kv head, rounded up;
    `scale`: with log2(e), so that powers are of two; `CHUNK`: parts joined at a time."""
    if OVERLAP:
        overlap.begin()
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    token = tl.program_id(2)
    kv_heads = tl.num_programs(1)
    length = tl.load(lengths_ptr + token)
    first = split * SPLIT
    group = (token * kv_heads + kv_head).to(tl.int64)
    dtype = q_ptr.dtype.element_ty

    head = tl.arange(0, HEADS)
    i = tl.arange(0, HEAD_DIM)
    exists = (head < GROUP)[:, None]
    offset = group * GROUP * HEAD_DIM + head[:, None] * HEAD_DIM + i[None, :]
    if first < length:
        q = tl.load(q_ptr + offset, mask=exists, other=0.0)
        slots_ptr = table_ptr + tl.load(rows_ptr + token).to(tl.int64) * max_len
        largest = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        mean = tl.zeros([HEADS, HEAD_DIM], tl.float32)
        end = tl.minimum(first + SPLIT, length)
        for start in range(first, end, BLOCK):
            position = start + tl.arange(0, BLOCK)
            inside = position < end
            slots = tl.load(slots_ptr + position, mask=inside, other=0).to(tl.int64)
            k = load_tokens(k_ptr, k_scale_ptr, slots, inside, kv_head, kv_heads, HEAD_DIM, INT8, dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(inside[None, :], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            v = load_tokens(v_ptr, v_scale_ptr, slots, inside, kv_head, kv_heads, HEAD_DIM, INT8, dtype)
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink[:, None] + tl.dot(weights.to(dtype), v, input_precision="ieee")
            largest = new_largest
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
