"""The operation between two levels of the vocoder: the mean of the residual blocks, and a leaky ReLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024


def mean_leaky_relu(x: Tensor, slope: float, out: Tensor) -> None:
    """x: (branches, ...); out: (...) float32 = leaky_relu(mean over the branches, slope)."""
    count = out.numel()
    _mean_leaky_relu_kernel[(triton.cdiv(count, BLOCK),)](
        x, out, slope, count, x.stride(0), BRANCHES=x.shape[0], BLOCK=BLOCK, num_warps=4
    )


def mean_leaky_relu_reference(x: Tensor, slope: float, out: Tensor) -> None:
    out.copy_(F.leaky_relu(torch.mean(x, dim=0), slope))


@triton.jit
def _mean_leaky_relu_kernel(
    x_ptr, out_ptr, slope, count, branch_stride, BRANCHES: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.static_range(BRANCHES):
        total += tl.load(x_ptr + at, mask=mask, other=0.0)
        x_ptr += branch_stride
    total = total * (1.0 / BRANCHES)
    tl.store(out_ptr + at, tl.where(total > 0.0, total, total * slope), mask=mask)
