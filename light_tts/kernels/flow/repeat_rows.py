"""Repeats rows, each to a place of its own: features of tokens to the rows of their frames."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap


def repeat_rows(x: Tensor, target: Tensor, out: Tensor) -> Tensor:
    """out[target[i]] = x[i // ratio] for each i with target[i] >= 0, where ratio is the number of targets per
    row of x. x: (rows, width); target: (ratio * rows,) int32; out: (any, width), rows may be strided."""
    count, width = len(target), x.shape[1]
    block_rows = 4
    _repeat_rows_kernel[(triton.cdiv(count, block_rows),)](
        x,
        target,
        out,
        out.stride(0),
        count,
        RATIO=count // len(x),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        BLOCK_ROWS=block_rows,
        num_warps=4,
        **overlap.options(x.device, "repeat_rows", count),
    )
    return out


def repeat_rows_reference(x: Tensor, target: Tensor, out: Tensor) -> Tensor:
    (wanted,) = torch.where(target >= 0)
    out[target[wanted].long()] = x[wanted // (len(target) // len(x))].to(out.dtype)
    return out


@triton.jit
def _repeat_rows_kernel(
    x_ptr,
    target_ptr,
    out_ptr,
    out_stride,
    count,
    RATIO: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    target = tl.load(target_ptr + place, mask=place < count, other=-1)
    column = tl.arange(0, BLOCK)
    mask = (target >= 0)[:, None] & (column < WIDTH)[None, :]
    if OVERLAP:
        overlap.begin()
    x = tl.load(x_ptr + (place // RATIO)[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    at = out_ptr + target[:, None] * out_stride + column[None, :]
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask=mask)
