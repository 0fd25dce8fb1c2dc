"""Linear layers over packed rows (see packed_conv.py), fused with what follows them in the flow's transformer
blocks and its encoder: an activation, or a residual sum and the LayerNorm of that.

There are two variants of norm plus linear layer. With many rows the kernel that wrote the residual stream has
also written its norm (`packed_linear_add_` with `normal`), and `packed_linear` only multiplies. With few rows
the linear layer normalises its input (layer_norm_linear.py).
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.flow.row_tiles import (
    Activation,
    activated,
    layer_norm,
    multiply_add,
    vector,
    weight_tile,
)
from light_tts.kernels.launch import Config, measured_for_rows


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, out: Tensor, activation: Activation = None
) -> Tensor:
    """x @ weight + bias, and activation. x: (rows, in); weight: (in, out); bias: (out,) float32; position:
    (rows,) int32, rows with negative position are skipped; out: (rows, out)."""
    rows, (width, out_width) = x.shape[0], weight.shape
    config = measured_for_rows(f"packed_linear_{width}x{out_width}", x, rows) or {
        "BLOCK_ROWS": 128,
        "BLOCK_IN": 64,
        "BLOCK_OUT": 128,
        "num_warps": 8,
        "num_stages": 3,
    }
    config["BLOCK_IN"] = min(config["BLOCK_IN"], max(16, triton.next_power_of_2(width)))
    _packed_linear_kernel[_grid(rows, out_width, config)](
        x,
        weight,
        bias,
        position,
        out,
        rows,
        IN=width,
        OUT=out_width,
        ACTIVATION=activation,
        **config,
        **overlap.options(x.device, "packed_linear", rows),
    )
    return out


def packed_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, out: Tensor, activation: Activation = None
) -> Tensor:
    y = x.float() @ weight.float() + bias
    if activation is not None:
        y = F.gelu(y) if activation == "gelu" else F.silu(y)
    inside = position >= 0
    out[inside] = y[inside].to(out.dtype)
    return out


def packed_linear_add_(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    normal: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """x += y @ weight + bias, in place. x: (rows, out), may be strided; y: (rows, in); weight: (in, out);
    bias: (out,) float32; position: (rows,) int32, rows with negative position are skipped; normal: (rows,
    out), receives the LayerNorm (without gain and offset) of the new x."""
    rows, (width, out_width) = y.shape[0], weight.shape
    small = rows <= (2048 if out_width <= 256 else 1024)
    if normal is None:
        config = measured_for_rows(f"packed_linear_add_{width}x{out_width}", x, rows) or {
            "BLOCK_ROWS": 16 if rows <= 256 < out_width else 32 if small else 64,
            "BLOCK_IN": 128 if small else 64,
            "BLOCK_OUT": 32 if small else 128,
            "num_warps": 4,
            "num_stages": 3,
        }
    else:
        config = measured_for_rows(f"packed_linear_add_norm_{width}x{out_width}", x, rows) or {
            "BLOCK_ROWS": 64,
            "BLOCK_IN": 64,
            "num_warps": 8,
            "num_stages": 3 if x.element_size() == 2 else 2,  # limited by shared memory
        }
        config["BLOCK_OUT"] = max(16, triton.next_power_of_2(out_width))  # a norm needs whole rows
    config["BLOCK_IN"] = min(config["BLOCK_IN"], max(16, triton.next_power_of_2(width)))
    _packed_linear_add_kernel[_grid(rows, out_width, config)](
        x,
        x.stride(0),
        y,
        weight,
        bias,
        position,
        x if normal is None else normal,
        rows,
        eps,
        IN=width,
        OUT=out_width,
        NORM=normal is not None,
        **config,
        **overlap.options(x.device, "packed_linear_add", rows),
    )
    return x


def packed_linear_add_reference_(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    normal: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    inside = position >= 0
    total = x.float() + y.float() @ weight.float() + bias
    x[inside] = total[inside].to(x.dtype)
    if normal is not None:
        normal[inside] = F.layer_norm(total, total.shape[1:], eps=eps)[inside].to(normal.dtype)
    return x


def _grid(rows: int, out_width: int, config: Config) -> tuple[int, int]:
    return triton.cdiv(rows, config["BLOCK_ROWS"]), triton.cdiv(out_width, config["BLOCK_OUT"])


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    row,
    column,
    inside,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rows `row` of x (rows, IN), where `inside`, times columns `column` of the weight, plus bias: float32.
    With OVERLAP it waits for the kernel in front before it reads x; if BLOCK_IN includes all inputs, it loads
    the weights first."""
    EARLY: tl.constexpr = OVERLAP and BLOCK_IN >= IN
    if OVERLAP:
        added = vector(bias_ptr, column, OUT)
        if EARLY:
            channel = tl.arange(0, BLOCK_IN)
            w = weight_tile(weight_ptr, channel, column, IN, OUT)
        overlap.begin()
    if EARLY:
        mask = inside[:, None] & (channel < IN)[None, :]
        x = tl.load(x_ptr + row[:, None] * IN + channel[None, :], mask=mask, other=0.0)
        total = tl.dot(x, w, input_precision="ieee")
    else:
        total = tl.zeros((row.shape[0], column.shape[0]), dtype=tl.float32)
        total = multiply_add(total, x_ptr + row * IN, weight_ptr, column, inside, IN, OUT, BLOCK_IN)
    if not OVERLAP:
        added = vector(bias_ptr, column, OUT)
    return total + added[None, :]


@triton.jit
def _packed_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    out_ptr,
    rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = tl.load(position_ptr + row, mask=row < rows, other=-1) >= 0
    if OVERLAP:
        overlap.prefetch_columns(weight_ptr, tl.program_id(1) * BLOCK_OUT, IN, OUT, BLOCK_OUT)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    y = _product(x_ptr, weight_ptr, bias_ptr, row, column, inside, IN, OUT, BLOCK_IN, OVERLAP)
    y = activated(y, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
    tl.store(
        out_ptr + row[:, None] * OUT + column[None, :],
        y.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < OUT)[None, :],
    )


@triton.jit
def _packed_linear_add_kernel(
    x_ptr,
    x_stride,
    y_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    normal_ptr,
    rows,
    eps,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = tl.load(position_ptr + row, mask=row < rows, other=-1) >= 0
    if OVERLAP:
        overlap.prefetch_columns(weight_ptr, tl.program_id(1) * BLOCK_OUT, IN, OUT, BLOCK_OUT)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    total = _product(y_ptr, weight_ptr, bias_ptr, row, column, inside, IN, OUT, BLOCK_IN, OVERLAP)
    at = x_ptr + row[:, None] * x_stride + column[None, :]
    mask = inside[:, None] & (column < OUT)[None, :]
    total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(x_ptr.dtype.element_ty), mask=mask)
    if NORM:
        total = layer_norm(total, column, OUT, eps)
        at = normal_ptr + row[:, None] * OUT + column[None, :]
        tl.store(at, total.to(normal_ptr.dtype.element_ty), mask=mask)
