"""RMS norm, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis. x: (tokens, size); weight: (size,) -> (tokens, size). The
    normed value is rounded to the dtype before it is scaled, as Qwen2 does."""
    out = torch.empty_like(x)
    _launch(x, x, weight, out, eps, add=False)
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    full = x.float()
    return weight * (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds `x` to `residual` in place. -> the norm of the new residual. All (tokens, size)"""
    out = torch.empty_like(x)
    _launch(residual, x, weight, out, eps, add=True)
    return out


def add_rms_norm_reference_(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(residual.add_(x), weight, eps)


def _launch(residual: Tensor, x: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool) -> None:
    tokens, size = x.shape
    _norm_kernel[(tokens,)](
        residual, x, weight, out, size, eps, ADD=add, BLOCK=triton.next_power_of_2(size), num_warps=4
    )


@triton.jit
def _norm_kernel(residual_ptr, x_ptr, weight_ptr, out_ptr, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program a token."""
    i = tl.arange(0, BLOCK)
    inside = i < size
    offset = tl.program_id(0).to(tl.int64) * size + i
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
        tl.debug_barrier()  # threads beyond a short row repeat the others' loads: all come before the store
        tl.store(residual_ptr + offset, x.to(dtype), mask=inside)
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)).to(dtype).to(tl.float32)
    tl.store(out_ptr + offset, (normed * weight).to(dtype), mask=inside)
