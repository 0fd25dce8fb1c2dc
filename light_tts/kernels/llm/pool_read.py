"""Reads tokens of the KV pool inside a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    """Load one head of the tokens in `slots`, (tokens,) int. -> (tokens, HEAD_DIM) of `dtype`, zero where not
    `exists`"""
    index = slots.to(tl.int64) * kv_heads + kv_head
    pointers = pool_ptr + index[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    x = tl.load(pointers, mask=exists[:, None], other=0)
    if INT8:
        x = x.to(dtype) * tl.load(scale_ptr + index, mask=exists, other=0.0)[:, None]
    return x


def read_reference(pool: Tensor, scales: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (slots, kv_heads, head_dim) float32, equal to `KVPool.read` in `dtype`"""
    x = pool[slots.long()].to(dtype)
    return (x if scales is None else x * scales[slots.long(), :, None]).float()
