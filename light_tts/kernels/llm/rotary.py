"""Rotary position embedding of q and k, fused with the write of k and v into the KV pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.common.kv_pool import LayerPool, quantize

Rope = tuple[Tensor, Tensor]  # cos, sin: (max_positions, head_dim / 2) float32


def rotary_kv_write(qkv: Tensor, rope: Rope, positions: Tensor, slots: Tensor, pool: LayerPool) -> Tensor:
    """Rotate q and k, first half against second half, and write k and v to one layer of the pool.

    qkv: (tokens, (heads + 2 * kv_heads) * head_dim); positions, slots: (tokens,) int32, nothing is written
    for a negative slot (batch padding); pool: of qkv's dtype, or int8 with scales of qkv's dtype, quantised
    as in `kv_pool.quantize` -> rotated q: (tokens, heads, head_dim)
    """
    (cos, sin), (k, v, k_scale, v_scale) = rope, pool
    kv_heads, head_dim = k.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = qkv.new_empty(qkv.shape[0], heads, head_dim)
    _rotary_kernel[(qkv.shape[0],)](
        qkv,
        cos,
        sin,
        positions,
        slots,
        q,
        k,
        v,
        k_scale,
        v_scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        ROTATED=triton.next_power_of_2(heads + kv_heads),
        VALUES=triton.next_power_of_2(kv_heads),
        HEAD_DIM=head_dim,
        INT8=k.dtype == torch.int8,
        TINY=torch.finfo(qkv.dtype).tiny,
        num_warps=2,
    )
    return q


def rotary_kv_write_reference(
    qkv: Tensor, rope: Rope, positions: Tensor, slots: Tensor, pool: LayerPool
) -> Tensor:
    k, v, k_scale, v_scale = pool
    kv_heads, head_dim = k.shape[1:]
    x = qkv.unflatten(-1, (-1, head_dim))
    a, b = x[:, :-kv_heads].float().chunk(2, dim=-1)
    cos, sin = (table[positions.long(), None] for table in rope)
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)
    q, new_k, new_v = rotated[:, :-kv_heads], rotated[:, -kv_heads:], x[:, -kv_heads:]
    kept = slots >= 0
    slots = slots[kept].long()
    for old, scales, new in ((k, k_scale, new_k[kept]), (v, v_scale, new_v[kept])):
        if scales is not None:
            new, scales[slots] = quantize(new)
        old[slots] = new
    return q.contiguous()


@triton.jit
def _rotary_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    ROTATED: tl.constexpr,
    VALUES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INT8: tl.constexpr,
    TINY: tl.constexpr,
):
    """One program per token. `ROTATED`, `VALUES`: number of heads of q and k, and of v, rounded up to a power
    of two."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    dtype = qkv_ptr.dtype.element_ty
    HALF: tl.constexpr = HEAD_DIM // 2
    source = qkv_ptr + token * (HEADS + 2 * KV_HEADS) * HEAD_DIM

    head = tl.arange(0, ROTATED)[:, None]
    i = tl.arange(0, HALF)[None, :]
    offset = head * HEAD_DIM + i
    exists = head < HEADS + KV_HEADS
    a = tl.load(source + offset, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(source + offset + HALF, mask=exists, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position * HALF + i)
    sin = tl.load(sin_ptr + position * HALF + i)
    new_a = (a * cos - b * sin).to(dtype)
    new_b = (b * cos + a * sin).to(dtype)
    q = q_ptr + token * HEADS * HEAD_DIM + offset
    tl.store(q, new_a, mask=head < HEADS)
    tl.store(q + HALF, new_b, mask=head < HEADS)

    if slot >= 0:
        kv_head = tl.arange(0, VALUES)[:, None]
        j = tl.arange(0, HEAD_DIM)[None, :]
        v_offset = kv_head * HEAD_DIM + j
        v_exists = kv_head < KV_HEADS
        value = tl.load(source + (HEADS + KV_HEADS) * HEAD_DIM + v_offset, mask=v_exists, other=0.0)
        k = k_ptr + slot * KV_HEADS * HEAD_DIM + offset - HEADS * HEAD_DIM
        v = v_ptr + slot * KV_HEADS * HEAD_DIM + v_offset
        is_k = exists & (head >= HEADS)
        if INT8:
            largest = tl.maximum(tl.abs(new_a.to(tl.float32)), tl.abs(new_b.to(tl.float32)))
            scale = scale_of(tl.max(largest, 1), dtype, TINY)
            k_scales = k_scale_ptr + slot * KV_HEADS + tl.arange(0, ROTATED) - HEADS
            is_k_head = (tl.arange(0, ROTATED) >= HEADS) & (tl.arange(0, ROTATED) < HEADS + KV_HEADS)
            tl.store(k_scales, scale, mask=is_k_head)
            tl.store(k, quantized(new_a, scale), mask=is_k)
            tl.store(k + HALF, quantized(new_b, scale), mask=is_k)

            scale = scale_of(tl.max(tl.abs(value.to(tl.float32)), 1), dtype, TINY)
            v_scales = v_scale_ptr + slot * KV_HEADS + tl.arange(0, VALUES)
            tl.store(v_scales, scale, mask=tl.arange(0, VALUES) < KV_HEADS)
            tl.store(v, quantized(value, scale), mask=v_exists)
        else:
            tl.store(k, new_a, mask=is_k)
            tl.store(k + HALF, new_b, mask=is_k)
            tl.store(v, value, mask=v_exists)


@triton.jit
def scale_of(largest, dtype: tl.constexpr, TINY: tl.constexpr):
    """largest: (heads,) float32 -> (heads,) of `dtype`"""
    scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)).to(dtype)
    return tl.maximum(scale.to(tl.float32), TINY).to(dtype)


@triton.jit
def quantized(x, scale):
    """x: (heads, n); scale: (heads,) -> (heads, n) int8. Each step is rounded to x's dtype, as in PyTorch."""
    divisor = tl.broadcast_to(scale.to(tl.float32)[:, None], x.shape)
    ratio = tl.div_rn(x.to(tl.float32), divisor).to(x.dtype).to(tl.float32)
    MAGIC: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, half to even
    rounded = (ratio + MAGIC) - MAGIC
    return tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)
