"""Convolution over the padded items of the flow's encoder: a linear layer over neighbouring positions, as a
product whose inputs are consecutive rows.

Few rows are divided among many programs by columns, too, unlike in packed_conv.py, whose norms need whole
rows.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.flow.row_tiles import vector, weight_tile
from light_tts.kernels.launch import measured_for_rows

LEAK = 0.01  # slope of the leaky ReLU below zero


def shifted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    size: int,
    first: int,
    then: Tensor | Literal["leaky_relu"] | None = None,
) -> Tensor:
    """Position t of an item depends on the positions t + first, t + first + 1, ... of it, one for each tap;
    there are zeros before its first and from `size` on. x: (items * size, in); weight: (taps, in, out); bias:
    (out,) float32; position: (items * size,) int32, rows with negative position are skipped; out: (items *
    size, out), not x; then: what follows, an activation or the addition of a tensor like `out`."""
    (taps, width, out_width), rows = weight.shape, len(x)
    config = measured_for_rows(f"shifted_linear_{taps}x{width}x{out_width}", x, rows) or {
        "BLOCK_ROWS": 16 if rows <= 256 else 32 if rows <= 1024 else 64,
        "BLOCK_OUT": 32 if rows <= 512 else 64 if rows <= 1024 else 128,
        "BLOCK_IN": 128 if rows <= 1024 else 64,
        "num_warps": 4,
        "num_stages": 4 if x.element_size() == 2 else 2,  # limited by shared memory
    }
    config["BLOCK_IN"] = min(config["BLOCK_IN"], max(16, triton.next_power_of_2(taps * width)))
    adds = isinstance(then, Tensor)
    _shifted_linear_kernel[
        (triton.cdiv(rows, config["BLOCK_ROWS"]), triton.cdiv(out_width, config["BLOCK_OUT"]))
    ](
        x,
        weight,
        bias,
        position,
        then if adds else out,
        out,
        rows,
        size,
        FIRST=first,
        TAPS=taps,
        IN=width,
        OUT=out_width,
        LEAKY=then == "leaky_relu" if not adds else False,
        LEAK=LEAK,
        ADD=adds,
        **config,
        **overlap.options(x.device, "shifted_linear", rows),
    )
    return out


def shifted_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    size: int,
    first: int,
    then: Tensor | Literal["leaky_relu"] | None = None,
) -> Tensor:
    taps, width, _ = weight.shape
    padded = F.pad(x.float().view(-1, size, width), (0, 0, -first, first + taps - 1))
    y = F.conv1d(padded.transpose(1, 2), weight.float().permute(2, 1, 0), bias).transpose(1, 2).flatten(0, 1)
    if isinstance(then, Tensor):
        y = y + then
    elif then is not None:
        y = F.leaky_relu(y, LEAK)
    inside = position >= 0
    out[inside] = y[inside].to(out.dtype)
    return out


@triton.jit
def _shifted_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    other_ptr,
    out_ptr,
    rows,
    size,
    FIRST: tl.constexpr,
    TAPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    LEAKY: tl.constexpr,
    LEAK: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    position = tl.load(position_ptr + row, mask=row < rows, other=-1)
    inside = position >= 0
    ALL: tl.constexpr = TAPS * IN
    if OVERLAP:
        overlap.prefetch_columns(weight_ptr, tl.program_id(1) * BLOCK_OUT, ALL, OUT, BLOCK_OUT)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    added = vector(bias_ptr, column, OUT)
    if OVERLAP:
        overlap.begin()
    first_row = x_ptr + (row + FIRST) * IN  # the inputs of all taps lie one after the other
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, ALL, BLOCK_IN):
        channel = start + tl.arange(0, BLOCK_IN)
        source = position[:, None] + (FIRST + channel // IN)[None, :]
        mask = inside[:, None] & (channel < ALL)[None, :] & (source >= 0) & (source < size)
        a = tl.load(first_row[:, None] + channel[None, :], mask=mask, other=0.0)
        b = weight_tile(weight_ptr, channel, column, ALL, OUT)
        total = tl.dot(a, b, total, input_precision="ieee")
    total += added[None, :]
    at = row[:, None] * OUT + column[None, :]
    mask = inside[:, None] & (column < OUT)[None, :]
    if LEAKY:
        total = tl.where(total < 0, total * LEAK, total)
    if ADD:
        total += tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
