"""Linear layers over packed rows (see packed_conv.py) with what stands before and behind them in the flow's
transformer blocks: a LayerNorm before, a GELU or a residual sum behind."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, out: Tensor, eps: float, gelu: bool
) -> Tensor:
    """LayerNorm without gain and offset, which are part of `weight` and `bias` (see `fold_norm`), linear,
    and exact GELU if `gelu`. x: (rows, in), rows may be strided; weight: (in, out); bias: (out,) float32;
    position: (rows,) int32, rows below 0 are left out; out: (rows, out)."""
    rows, width = x.shape
    block_rows = 32 if rows <= 1024 else 64 if rows <= 8192 else 128
    block_out = 64 if rows <= 1024 else 128
    blocks = triton.cdiv(rows, block_rows)
    tiles = triton.cdiv(weight.shape[1], block_out)
    # each program keeps its normalised rows and takes several tiles of the weight, if there are many programs
    tiles_each = max(1, min(tiles, tiles * blocks // 264))
    _norm_linear[(blocks, triton.cdiv(tiles, tiles_each))](
        x,
        x.stride(0),
        weight,
        bias,
        position,
        out,
        rows,
        eps,
        IN=width,
        OUT=weight.shape[1],
        GELU=gelu,
        TILES=tiles_each,
        BLOCK_ROWS=block_rows,
        BLOCK_IN=max(16, triton.next_power_of_2(width)),
        BLOCK_OUT=block_out,
        num_warps=8 if block_rows == 128 else 4,
        num_stages=2,
    )
    return out


def norm_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, out: Tensor, eps: float, gelu: bool
) -> Tensor:
    y = F.layer_norm(x.float(), x.shape[1:], eps=eps) @ weight.float() + bias
    inside = position >= 0
    out[inside] = (F.gelu(y) if gelu else y)[inside].to(out.dtype)
    return out


def fold_norm(gain: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight (in, out) and bias (out,) such that linear(layer_norm(x)) = layer_norm_without_affine(x) @
    weight + bias. gain, offset: (in,); weight: (out, in); all float32."""
    folded = (weight * gain).T.contiguous()
    return folded, weight @ offset if bias is None else weight @ offset + bias


def linear_add_(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """x += y @ weight + bias, in place. x: (rows, out), may be strided; y: (rows, in); weight: (in, out);
    bias: (out,) float32; position: (rows,) int32, rows below 0 are left out."""
    rows, width = y.shape
    small = rows <= 2048
    block_rows = 32 if small else 64
    block_out = 32 if small else 128
    _linear_add[(triton.cdiv(rows, block_rows), triton.cdiv(x.shape[1], block_out))](
        x,
        x.stride(0),
        y,
        weight,
        bias,
        position,
        rows,
        IN=width,
        OUT=x.shape[1],
        BLOCK_ROWS=block_rows,
        BLOCK_IN=min(128 if small else 64, max(16, triton.next_power_of_2(width))),
        BLOCK_OUT=block_out,
        num_warps=4,
        num_stages=3,
    )
    return x


def linear_add_reference_(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    inside = position >= 0
    total = x.float() + y.float() @ weight.float() + bias
    x[inside] = total[inside].to(x.dtype)
    return x


@triton.jit
def _norm_linear(
    x,
    x_stride,
    weight,
    bias,
    position,
    out,
    rows,
    eps,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GELU: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = tl.load(position + row, mask=row < rows, other=-1) >= 0
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    channel = tl.arange(0, BLOCK_IN)
    known = channel < IN
    values = tl.load(
        x + row[:, None] * x_stride + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
    ).to(tl.float32)
    mean = tl.sum(values, axis=1) / IN
    centred = tl.where(known[None, :], values - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / IN + eps)
    normal = (centred * scale[:, None]).to(weight.dtype.element_ty)
    for tile in range(TILES):
        column = (tl.program_id(1) * TILES + tile) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        w = tl.load(
            weight + channel[:, None] * OUT + column[None, :],
            mask=known[:, None] & (column < OUT)[None, :],
            other=0.0,
        )
        y = tl.dot(normal, w, input_precision="ieee")
        y += tl.load(bias + column, mask=column < OUT, other=0.0)[None, :]
        if GELU:
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        tl.store(
            out + row[:, None] * OUT + column[None, :],
            y.to(out.dtype.element_ty),
            mask=inside[:, None] & (column < OUT)[None, :],
        )


@triton.jit
def _linear_add(
    x,
    x_stride,
    y,
    weight,
    bias,
    position,
    rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = tl.load(position + row, mask=row < rows, other=-1) >= 0
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, IN, BLOCK_IN):
        channel = start + tl.arange(0, BLOCK_IN)
        known = channel < IN
        a = tl.load(
            y + row[:, None] * IN + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        b = tl.load(
            weight + channel[:, None] * OUT + column[None, :],
            mask=known[:, None] & (column < OUT)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    total += tl.load(bias + column, mask=column < OUT, other=0.0)[None, :]
    at = x + row[:, None] * x_stride + column[None, :]
    mask = inside[:, None] & (column < OUT)[None, :]
    total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(x.dtype.element_ty), mask=mask)
