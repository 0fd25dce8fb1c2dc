"""Causal convolution over packed rows, fused with the operations that follow it in the flow's residual
blocks.

A packed batch is the concatenated frames of several sequences without padding: rows (rows, channels).
`position` is each row's frame index in its sequence, or -1 for unused rows at the end of the buffer, which
are neither computed nor written. A sequence may continue frames that are not in the batch, the last of which
have been cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.flow.row_tiles import layer_norm, mish, multiply_add, vector
from light_tts.kernels.launch import measured_for_rows


@dataclass(frozen=True)
class Norm:
    """LayerNorm over the channels, followed by Mish. weight, bias: (channels,)"""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class Shift:
    """Row `step` of `table` is added after convolution and norm. table: (steps, out) float32; step: one int32
    on the device"""

    table: Tensor
    step: Tensor


@dataclass(frozen=True)
class Residual:
    """x @ weight + bias, added at the end. x: (rows, in); weight: (in, out); bias: (out,)"""

    x: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class CachedEdges:
    """The cached inputs at the last frames of each page (see packed_attention.py). store: (pages, steps,
    copies, taps - 1, in); before: (rows,) int32, the page preceding the row's sequence, -1: zeros; keep:
    (rows,) int32, page * (taps - 1) + position where the row is to be stored, -1: not stored. step: one int32
    on the device."""

    store: Tensor
    before: Tensor
    keep: Tensor
    step: Tensor


def packed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    norm: Norm | None = None,
    shift: Shift | None = None,
    residual: Residual | None = None,
    normal: Tensor | None = None,
    eps: float = 0.0,
    cached: CachedEdges | None = None,
) -> Tensor:
    """x: (rows, in), rows may be strided; weight: (taps, in, out), the last tap is the current frame;
    position: (rows,) int32; out: (rows, out), must not overlap x. After convolution, norm and Mish the shift
    is added, then the residual. normal: (rows, out), receives the LayerNorm (without gain and offset) of the
    result. cached: None if every sequence begins in the batch and nothing is cached."""
    taps, channels_in, channels_out = weight.shape
    rows = x.shape[0]
    config = measured_for_rows(f"packed_conv_{channels_in}x{channels_out}", x, rows) or {
        "BLOCK_ROWS": 16 if rows <= 1024 else 32 if rows <= 4096 else 64,
        "BLOCK_IN": 64,
        "num_warps": 4 if rows <= 4096 else 8,
        "num_stages": 3 if x.element_size() == 2 else 2,  # limited by shared memory
    }
    config["BLOCK_IN"] = min(config["BLOCK_IN"], max(16, triton.next_power_of_2(channels_in)))
    # a norm needs whole rows; without one, few rows are divided among more programs
    whole = norm is not None or normal is not None or rows > 1024
    block_out = max(16, min(triton.next_power_of_2(channels_out), 1 << 30 if whole else 64))
    # tensors that are absent are never read, so any tensor can stand in for them
    norm_weight, norm_bias = (bias, bias) if norm is None else (norm.weight, norm.bias)
    side = Residual(x, weight, bias) if residual is None else residual
    edges = CachedEdges(x, position, position, position) if cached is None else cached
    step = cached.step if cached is not None else shift.step if shift is not None else position
    _packed_conv_kernel[(triton.cdiv(rows, config["BLOCK_ROWS"]), triton.cdiv(channels_out, block_out))](
        x,
        x.stride(0),
        weight,
        bias,
        norm_weight,
        norm_bias,
        bias if shift is None else shift.table,
        step,
        side.x,
        side.x.stride(0),
        side.weight,
        side.bias,
        position,
        out,
        out.stride(0),
        out if normal is None else normal,
        edges.store,
        edges.before,
        edges.keep,
        rows,
        0.0 if norm is None else norm.eps,
        eps,
        TAPS=taps,
        IN=channels_in,
        OUT=channels_out,
        SIDE_IN=side.x.shape[1],
        NORM=norm is not None,
        SHIFT=shift is not None,
        SIDE=residual is not None,
        NORMAL=normal is not None,
        KEPT=cached is not None,
        STEPS=1 if cached is None else cached.store.shape[1],
        COPIES=1 if cached is None else cached.store.shape[2],
        BLOCK_OUT=block_out,
        **config,
        **overlap.options(x.device, "packed_conv", rows),
    )
    return out


def packed_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    norm: Norm | None = None,
    shift: Shift | None = None,
    residual: Residual | None = None,
    normal: Tensor | None = None,
    eps: float = 0.0,
    cached: CachedEdges | None = None,
) -> Tensor:
    taps = weight.shape[0]
    total = bias.float().expand(x.shape[0], -1)
    for tap in range(taps):
        earlier = earlier_reference(x, position, taps - 1 - tap, cached)
        total = total + earlier @ weight[tap].float()
    if cached is not None:
        keep_edges_reference(x, cached)
    if norm is not None:
        total = F.layer_norm(total, total.shape[1:], norm.weight.float(), norm.bias.float(), norm.eps)
        total = F.mish(total)
    if shift is not None:
        total = total + shift.table[shift.step.long()].view(1, -1)
    if residual is not None:
        total = total + residual.x.float() @ residual.weight.float() + residual.bias.float()
    inside = position >= 0
    out[inside] = total[inside].to(out.dtype)
    if normal is not None:
        normal[inside] = F.layer_norm(total, total.shape[1:], eps=eps)[inside].to(normal.dtype)
    return out


def earlier_reference(x: Tensor, position: Tensor, back: int, cached: CachedEdges | None) -> Tensor:
    """Return for each row the one `back` frames before it in its sequence, zeros if there is none: (rows, in)
    float32"""
    earlier = torch.roll(x.float(), back, dims=0) * (position >= back)[:, None]
    if cached is not None:
        row = ((position >= 0) & (position < back) & (cached.before >= 0)).nonzero()[:, 0]
        place = cached.store.shape[3] + position[row] - back
        earlier[row] = cached.store[
            cached.before[row].long(), int(cached.step), _copy(row, x, cached), place.long()
        ].float()
    return earlier


def keep_edges_reference(x: Tensor, cached: CachedEdges) -> None:
    """Store the rows of x that are to be kept."""
    edge = cached.store.shape[3]
    row = (cached.keep >= 0).nonzero()[:, 0]
    page, place = cached.keep[row].long() // edge, cached.keep[row].long() % edge
    cached.store[page, int(cached.step), _copy(row, x, cached), place] = x[row].to(cached.store.dtype)


def _copy(row: Tensor, x: Tensor, cached: CachedEdges) -> Tensor:
    """Return the index of the batch copy that each row belongs to."""
    return row // (len(x) // cached.store.shape[2])


@triton.jit
def _packed_conv_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    shift_ptr,
    step_ptr,
    side_ptr,
    side_stride,
    side_weight_ptr,
    side_bias_ptr,
    position_ptr,
    out_ptr,
    out_stride,
    normal_ptr,
    edges_ptr,
    before_ptr,
    keep_ptr,
    rows,
    norm_eps,
    eps,
    TAPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    SIDE_IN: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    SIDE: tl.constexpr,
    NORMAL: tl.constexpr,
    KEPT: tl.constexpr,
    STEPS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    known = column < OUT
    here = tl.load(position_ptr + row, mask=row < rows, other=-1)
    if KEPT:
        page = tl.load(before_ptr + row, mask=row < rows, other=-1)
        place = tl.load(keep_ptr + row, mask=row < rows, other=-1)
    if OVERLAP:
        first_column = tl.program_id(1) * BLOCK_OUT
        overlap.prefetch_columns(weight_ptr, first_column, TAPS * IN, OUT, BLOCK_OUT)
        if SIDE:
            overlap.prefetch_columns(side_weight_ptr, first_column, SIDE_IN, OUT, BLOCK_OUT)
    if tl.max(here, axis=0) < 0:
        return
    if OVERLAP:
        added = vector(bias_ptr, column, OUT)
        if NORM:
            gain = vector(norm_weight_ptr, column, OUT)
            offset = vector(norm_bias_ptr, column, OUT)
        if SIDE:
            side_added = vector(side_bias_ptr, column, OUT)
        overlap.begin()
        if SHIFT or KEPT:
            now = tl.load(step_ptr)  # after the wait: without a graph the previous kernel has written it
    EDGE: tl.constexpr = TAPS - 1
    if KEPT:
        copy = row // (rows // COPIES)
        first = (here >= 0) & (here < EDGE) & (page >= 0)
        # a load for each row, so that programs without such rows do not wait for it
        edge = (page * STEPS + tl.load(step_ptr + row * 0, mask=first, other=0)) * COPIES + copy
        edge = edge * EDGE + here
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        back = TAPS - 1 - tap
        inside = here >= back
        earlier = x_ptr + (row - back) * x_stride
        if KEPT:
            past = first & (here < back)
            earlier = tl.where(past, edges_ptr + (edge + tap) * IN, earlier)
            inside = inside | past
        taken = weight_ptr + tap * IN * OUT
        total = multiply_add(total, earlier, taken, column, inside, IN, OUT, BLOCK_IN)
    if KEPT:
        if not OVERLAP:
            now = tl.load(step_ptr)
        if tl.max(place, axis=0) >= 0 and tl.program_id(1) == 0:
            at = ((place // EDGE * STEPS + now) * COPIES + copy) * EDGE + place % EDGE
            for start in range(0, IN, BLOCK_IN):
                channel = start + tl.arange(0, BLOCK_IN)
                stays = (place >= 0)[:, None] & (channel < IN)[None, :]
                value = tl.load(x_ptr + row[:, None] * x_stride + channel[None, :], mask=stays, other=0.0)
                tl.store(edges_ptr + at[:, None] * IN + channel[None, :], value, mask=stays)
    if not OVERLAP:
        added = vector(bias_ptr, column, OUT)
    total += added.to(tl.float32)[None, :]
    if NORM:
        if not OVERLAP:
            gain = vector(norm_weight_ptr, column, OUT)
            offset = vector(norm_bias_ptr, column, OUT)
        total = layer_norm(total, column, OUT, norm_eps) * gain.to(tl.float32)[None, :]
        total += offset.to(tl.float32)[None, :]
        total = mish(total)
    if SHIFT:
        if not OVERLAP:
            now = tl.load(step_ptr)
        total += vector(shift_ptr + now * OUT, column, OUT)[None, :]
    if SIDE:
        own = side_ptr + row * side_stride
        total = multiply_add(total, own, side_weight_ptr, column, here >= 0, SIDE_IN, OUT, BLOCK_IN)
        if not OVERLAP:
            side_added = vector(side_bias_ptr, column, OUT)
        total += side_added.to(tl.float32)[None, :]
    mask = (here >= 0)[:, None] & known[None, :]
    tl.store(
        out_ptr + row[:, None] * out_stride + column[None, :], total.to(out_ptr.dtype.element_ty), mask=mask
    )
    if NORMAL:
        total = layer_norm(total, column, OUT, eps)
        tl.store(
            normal_ptr + row[:, None] * OUT + column[None, :],
            total.to(normal_ptr.dtype.element_ty),
            mask=mask,
        )
