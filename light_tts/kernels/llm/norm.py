"""RMS norm without a weight (which is folded into the following linear layer, see
`small_linear.fold_rms_norm`), alone and fused with the residual addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis. x: (tokens, size) -> like x"""
    out = torch.empty_like(x)
    _launch(x, x, out, eps, add=False)
    return out


def rms_norm_reference(x: Tensor, eps: float) -> Tensor:
    full = x.float()
    return (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm_(residual: Tensor, x: Tensor, eps: float) -> Tensor:
    """Add `x` to `residual` in place; return the norm of the new residual. All (tokens, size)"""
    out = torch.empty_like(x)
    _launch(residual, x, out, eps, add=True)
    return out


def add_rms_norm_reference_(residual: Tensor, x: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(residual.add_(x), eps)


def _launch(residual: Tensor, x: Tensor, out: Tensor, eps: float, add: bool) -> None:
    tokens, size = x.shape
    _norm_kernel[(tokens,)](
        residual, x, out, size, eps, ADD=add, BLOCK=triton.next_power_of_2(size), num_warps=4
    )


@triton.jit
def _norm_kernel(residual_ptr, x_ptr, out_ptr, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program per token."""
    i = tl.arange(0, BLOCK)
    inside = i < size
    offset = tl.program_id(0).to(tl.int64) * size + i
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
        # threads beyond a short row repeat the others' loads, so all loads must precede the store
        tl.debug_barrier()
        tl.store(residual_ptr + offset, x.to(dtype), mask=inside)
    tl.store(out_ptr + offset, (x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)).to(dtype), mask=inside)
