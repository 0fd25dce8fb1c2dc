"""LayerNorm of rows as a kernel of its own, where no neighbouring kernel computes it."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.flow.row_tiles import layer_norm, vector


def row_norm(
    x: Tensor, position: Tensor, out: Tensor, eps: float, affine: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """x, out: (rows, width), may be the same; position: (rows,) int32, rows with negative position are
    skipped; affine: gain and offset, (width,) float32; None: neither."""
    rows, width = x.shape
    gain, offset = (x, x) if affine is None else affine  # never read if absent
    block_rows = 1 if rows <= 512 else 4
    _row_norm_kernel[(triton.cdiv(rows, block_rows),)](
        x,
        gain,
        offset,
        position,
        out,
        rows,
        eps,
        WIDTH=width,
        AFFINE=affine is not None,
        BLOCK_ROWS=block_rows,
        BLOCK=triton.next_power_of_2(width),
        num_warps=block_rows,
        **overlap.options(x.device, "row_norm", rows),
    )
    return out


def row_norm_reference(
    x: Tensor, position: Tensor, out: Tensor, eps: float, affine: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    gain, offset = (None, None) if affine is None else affine
    inside = position >= 0
    out[inside] = F.layer_norm(x[inside].float(), x.shape[1:], gain, offset, eps).to(out.dtype)
    return out


@triton.jit
def _row_norm_kernel(
    x_ptr,
    gain_ptr,
    offset_ptr,
    position_ptr,
    out_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    inside = tl.load(position_ptr + row, mask=row < rows, other=-1) >= 0
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    if OVERLAP:
        overlap.begin()
    at = row[:, None] * WIDTH + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    y = layer_norm(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), column, WIDTH, eps)
    if AFFINE:
        y = y * vector(gain_ptr, column, WIDTH)[None, :] + vector(offset_ptr, column, WIDTH)[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
