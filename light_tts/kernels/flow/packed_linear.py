"""Linear layers over packed rows (see packed_conv.py), fused with what follows them in the flow's transformer
blocks and its encoder: an activation, or a residual sum and the LayerNorm of that.

There are two variants of norm plus linear layer. With many rows the kernel that wrote the residual stream has
also written its norm (`packed_linear_add_` with `normal`), and `packed_linear` only multiplies. With few rows
the linear layer normalises its input (layer_norm_linear.py).

In a diffusion transformer the norm is a kernel of its own (modulated_norm.py), queries and keys are rotated,
and what is added to the residual stream is multiplied by a gate of the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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
    saturated,
    saturated_reference,
    vector,
    weight_tile,
)
from light_tts.kernels.launch import Config, measured_for_rows


@dataclass(frozen=True)
class Rotary:
    """The columns [start, start + dim) of the result, for each of the two in `starts` (of queries and of
    keys), are rotated in pairs (2k, 2k + 1) by the angles of the row's frame. frame: (rows of one copy,)
    int32; table: see `rotary_table`; starts and dim: multiples of 16."""

    frame: Tensor
    table: Tensor
    starts: tuple[int, int]
    dim: int


def rotary_table(inv_freq: Tensor, positions: int) -> Tensor:
    """Return (positions, dim) float32: the cosines, then the sines of position * inv_freq. inv_freq: (dim /
    2,)"""
    angle = torch.arange(positions, device=inv_freq.device)[:, None] * inv_freq.float()
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True)
class Gate:
    """Row `step` of `table`, a factor for each column. table: (steps, out) float32, may be strided in the
    first dimension; step: one int32 on the device"""

    table: Tensor
    step: Tensor


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    activation: Activation = None,
    rotation: Rotary | None = None,
) -> Tensor:
    """x @ weight + bias, activation and rotation. x: (rows, in); weight: (in, out); bias: (out,) float32;
    position: (rows,) int32, rows with negative position are skipped; out: (rows, out), saturates if it is
    float16."""
    rows, (width, out_width) = x.shape[0], weight.shape
    name = f"packed_linear_{width}x{out_width}"
    config = measured_for_rows(name, x, rows)
    config = (
        config
        or _wide_config(x, rows, out_width)
        or {
            "BLOCK_ROWS": 128,
            "BLOCK_IN": 64,
            "BLOCK_OUT": 128,
            "num_warps": 8,
            "num_stages": 3,
        }
    )
    config["BLOCK_IN"] = min(config["BLOCK_IN"], max(16, triton.next_power_of_2(width)))
    # tensors that are absent are never read, so any tensor can stand in for them
    turn = Rotary(position, bias, (0, 0), 0) if rotation is None else rotation
    _packed_linear_kernel[_grid(rows, out_width, config)](
        x,
        weight,
        bias,
        position,
        out,
        turn.frame,
        turn.table,
        rows,
        len(turn.frame),
        IN=width,
        OUT=out_width,
        ACTIVATION=activation,
        ROTATED=rotation is not None,
        FIRST=turn.starts[0],
        SECOND=turn.starts[1],
        DIM=turn.dim,
        **config,
        **overlap.options(x.device, name, rows),
    )
    return out


def packed_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    activation: Activation = None,
    rotation: Rotary | None = None,
) -> Tensor:
    y = x.float() @ weight.float() + bias
    if activation == "silu":
        y = F.silu(y)
    elif activation is not None:
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if rotation is not None:
        frame = rotation.frame.repeat(len(x) // len(rotation.frame)).clamp(min=0).long()
        cos, sin = rotation.table[frame].chunk(2, dim=1)
        for start in rotation.starts:
            turned = y[:, start : start + rotation.dim]
            even, odd = turned[:, ::2], turned[:, 1::2]
            pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=2)
            y[:, start : start + rotation.dim] = pairs.flatten(1)
    inside = position >= 0
    out[inside] = saturated_reference(y, out.dtype)[inside]
    return out


def packed_linear_add_(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    normal: Tensor | None = None,
    eps: float = 0.0,
    gate: Gate | None = None,
) -> Tensor:
    """x += gate * (y @ weight + bias), in place. x: (rows, out), may be strided and float32 whatever the
    dtype of y and weight; y: (rows, in); weight: (in, out); bias: (out,) float32; position: (rows,) int32,
    rows with negative position are skipped; normal: (rows, out), receives the LayerNorm (without gain and
    offset) of the new x."""
    rows, (width, out_width) = y.shape[0], weight.shape
    small = rows <= (2048 if out_width <= 256 else 1024)
    if normal is None:
        config = measured_for_rows(f"packed_linear_add_{width}x{out_width}", y, rows)
        config = (
            config
            or _wide_config(y, rows, out_width)
            or {
                "BLOCK_ROWS": 16 if rows <= 256 < out_width else 32 if small else 64,
                "BLOCK_IN": 128 if small else 64,
                "BLOCK_OUT": 32 if small else 128,
                "num_warps": 4,
                "num_stages": 3,
            }
        )
    else:
        config = measured_for_rows(f"packed_linear_add_norm_{width}x{out_width}", y, rows) or {
            "BLOCK_ROWS": 64,
            "BLOCK_IN": 64,
            "num_warps": 8,
            "num_stages": 3 if y.element_size() == 2 else 2,  # limited by shared memory
        }
        config["BLOCK_OUT"] = max(16, triton.next_power_of_2(out_width))  # a norm needs whole rows
    config["BLOCK_IN"] = min(config["BLOCK_IN"], max(16, triton.next_power_of_2(width)))
    # tensors that are absent are never read, so any tensor can stand in for them
    factor = Gate(bias, position) if gate is None else gate
    _packed_linear_add_kernel[_grid(rows, out_width, config)](
        x,
        x.stride(0),
        y,
        weight,
        bias,
        position,
        x if normal is None else normal,
        factor.table,
        factor.table.stride(0),
        factor.step,
        rows,
        eps,
        IN=width,
        OUT=out_width,
        NORM=normal is not None,
        GATED=gate is not None,
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
    gate: Gate | None = None,
) -> Tensor:
    inside = position >= 0
    product = y.float() @ weight.float() + bias
    if gate is not None:
        product = product * gate.table[int(gate.step)]
    total = x.float() + product
    x[inside] = total[inside].to(x.dtype)
    if normal is not None:
        normal[inside] = F.layer_norm(total, total.shape[1:], eps=eps)[inside].to(normal.dtype)
    return x


def _wide_config(x: Tensor, rows: int, out_width: int) -> Config | None:
    """Return the configuration with the largest tiles that occupy most of a GPU, if input and output are so
    wide that few rows can; else None."""
    if min(x.shape[1], out_width) < 1024:
        return None
    names = "BLOCK_ROWS", "BLOCK_OUT", "BLOCK_IN", "num_warps", "num_stages"
    bytes_ = x.element_size()
    configs = [
        dict(zip(names, values, strict=True))
        for values in (
            (128, 128, 128 // bytes_, 8, 3),
            (64, 128, 128 // bytes_, 4, 4),
            (64, 64, 256 // bytes_, 4, 4),
            (64, 32, 256 // bytes_, 4, 4),
        )
    ]
    return next((one for one in configs if math.prod(_grid(rows, out_width, one)) >= 96), configs[-1])


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
def _rotated(
    y,
    frame,
    inside,
    table_ptr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Rotate what there is of the columns [FIRST, FIRST + DIM) and [SECOND, SECOND + DIM) in y: see `Rotary`.
    frame: of each row, where `inside`."""
    even, odd = tl.split(tl.reshape(y, (y.shape[0], BLOCK_OUT // 2, 2)))
    column = tl.program_id(1) * BLOCK_OUT + 2 * tl.arange(0, BLOCK_OUT // 2)
    column -= tl.where((column >= SECOND) & (column < SECOND + DIM), SECOND, FIRST)
    mask = inside[:, None] & ((column >= 0) & (column < DIM))[None, :]
    at = table_ptr + frame[:, None] * DIM + column[None, :] // 2
    cos = tl.load(at, mask=mask, other=1.0)
    sin = tl.load(at + DIM // 2, mask=mask, other=0.0)
    return tl.interleave(even * cos - odd * sin, odd * cos + even * sin)


@triton.jit
def _packed_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    out_ptr,
    frame_ptr,
    table_ptr,
    rows,
    copy_rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DIM: tl.constexpr,
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
    if ROTATED:
        start = tl.program_id(1) * BLOCK_OUT
        of_first = (start < FIRST + DIM) & (start + BLOCK_OUT > FIRST)
        of_second = (start < SECOND + DIM) & (start + BLOCK_OUT > SECOND)
        if of_first | of_second:
            frame = tl.load(frame_ptr + row % copy_rows, mask=inside, other=0)
            y = _rotated(y, frame, inside, table_ptr, FIRST, SECOND, DIM, BLOCK_OUT)
    tl.store(
        out_ptr + row[:, None] * OUT + column[None, :],
        saturated(y, out_ptr.dtype.element_ty),
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
    gate_ptr,
    gate_stride,
    step_ptr,
    rows,
    eps,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
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
    if GATED:
        total *= vector(gate_ptr + tl.load(step_ptr) * gate_stride, column, OUT)[None, :]
    at = x_ptr + row[:, None] * x_stride + column[None, :]
    mask = inside[:, None] & (column < OUT)[None, :]
    total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(x_ptr.dtype.element_ty), mask=mask)
    if NORM:
        total = layer_norm(total, column, OUT, eps)
        at = normal_ptr + row[:, None] * OUT + column[None, :]
        tl.store(at, total.to(normal_ptr.dtype.element_ty), mask=mask)
