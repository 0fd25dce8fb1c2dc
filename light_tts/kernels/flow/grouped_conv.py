"""Causal grouped convolution with many taps over packed rows (see packed_conv.py), followed by Mish and a
residual sum: the positional encoding of a diffusion transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.flow.packed_conv import CachedEdges, earlier_reference, keep_edges_reference
from light_tts.kernels.flow.row_tiles import mish, saturated, saturated_reference, vector, weight_tile
from light_tts.kernels.launch import measured_for_rows


def grouped_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
    cached: CachedEdges | None = None,
) -> Tensor:
    """mish(conv(x) + bias) + residual. x: (rows, channels); weight: (taps, groups, in of a group, out of a
    group), the last tap is the current frame; bias: (channels,) float32; position: (rows,) int32, rows with
    negative position are skipped; out: (rows, channels), must not overlap x, saturates if it is float16;
    residual: (rows, channels) float32, may be `out`; cached: None if every sequence begins in the batch and
    nothing is cached. x is converted to the dtype of the weight, before it is cached, too."""
    taps, groups, width, out_width = weight.shape
    rows = x.shape[0]
    config = measured_for_rows(f"grouped_conv_{groups}x{width}x{out_width}", weight, rows) or {
        "BLOCK_ROWS": 32 if rows <= 256 else 64 if rows <= 1024 else 128,
        "num_warps": 4,
        "num_stages": 4 if weight.element_size() == 2 else 2,  # limited by shared memory
    }
    # tensors that are absent are never read, so any tensor can stand in for them
    edges = CachedEdges(x, position, position, position) if cached is None else cached
    _grouped_conv_kernel[(triton.cdiv(rows, config["BLOCK_ROWS"]), groups)](
        x,
        weight,
        bias,
        position,
        out,
        x if residual is None else residual,
        edges.store,
        edges.before,
        edges.keep,
        edges.step,
        rows,
        TAPS=taps,
        GROUPS=groups,
        IN=width,
        OUT=out_width,
        RESIDUAL=residual is not None,
        KEPT=cached is not None,
        STEPS=1 if cached is None else cached.store.shape[1],
        COPIES=1 if cached is None else cached.store.shape[2],
        BLOCK_IN=max(16, triton.next_power_of_2(width)),
        BLOCK_OUT=max(16, triton.next_power_of_2(out_width)),
        **config,
        **overlap.options(x.device, "grouped_conv", rows),
    )
    return out


def grouped_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
    cached: CachedEdges | None = None,
) -> Tensor:
    taps, groups = weight.shape[:2]
    x = saturated_reference(x, weight.dtype)
    total = bias.expand(x.shape[0], -1)
    for tap in range(taps):
        earlier = earlier_reference(x, position, taps - 1 - tap, cached)
        product = torch.einsum("rgi,gio->rgo", earlier.unflatten(1, (groups, -1)), weight[tap].float())
        total = total + product.flatten(1)
    if cached is not None:
        keep_edges_reference(x, cached)
    total = F.mish(total)
    if residual is not None:
        total = total + residual
    inside = position >= 0
    out[inside] = saturated_reference(total, out.dtype)[inside]
    return out


@triton.jit
def _grouped_conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    out_ptr,
    residual_ptr,
    edges_ptr,
    before_ptr,
    keep_ptr,
    step_ptr,
    rows,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEPT: tl.constexpr,
    STEPS: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """A program computes one group of its rows."""
    EDGE: tl.constexpr = TAPS - 1
    WIDTH: tl.constexpr = GROUPS * IN  # of a row of x
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    group = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_IN)
    column = tl.arange(0, BLOCK_OUT)
    known = channel < IN
    here = tl.load(position_ptr + row, mask=row < rows, other=-1)
    if KEPT:
        page = tl.load(before_ptr + row, mask=row < rows, other=-1)
        place = tl.load(keep_ptr + row, mask=row < rows, other=-1)
    weight_ptr += group * IN * OUT
    if OVERLAP:
        for tap in range(TAPS):
            overlap.prefetch_columns(weight_ptr + tap * WIDTH * OUT, 0, IN, OUT, BLOCK_OUT)
    if tl.max(here, axis=0) < 0:
        return
    if OVERLAP:
        overlap.begin()
    own = x_ptr + (row * WIDTH + group * IN)[:, None] + channel[None, :]
    if KEPT:
        now = tl.load(step_ptr)
        copy = row // (rows // COPIES)
        edges_ptr += group * IN + channel[None, :]
        first = (here >= 0) & (here < EDGE) & (page >= 0)
        edge = ((page.to(tl.int64) * STEPS + now) * COPIES + copy) * EDGE + here
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for tap in range(TAPS):
        back = EDGE - tap
        inside = (here >= back)[:, None] & known[None, :]
        earlier = saturated(tl.load(own - back * WIDTH, mask=inside, other=0.0), DTYPE)
        if KEPT:
            past = (first & (here < back))[:, None]
            cached = tl.load(edges_ptr + (edge + tap)[:, None] * WIDTH, mask=past & known[None, :], other=0.0)
            earlier = tl.where(past, cached.to(DTYPE), earlier)
        w = weight_tile(weight_ptr + tap * WIDTH * OUT, channel, column, IN, OUT)
        total = tl.dot(earlier, w, total, input_precision="ieee")
    if KEPT:
        keeps = tl.max(place, axis=0) >= 0
        if keeps:
            at = ((place.to(tl.int64) // EDGE * STEPS + now) * COPIES + copy) * EDGE + place % EDGE
            stays = (place >= 0)[:, None] & known[None, :]
            value = saturated(tl.load(own, mask=stays, other=0.0), DTYPE)
            tl.store(edges_ptr + at[:, None] * WIDTH, value, mask=stays)
    total = mish(total + vector(bias_ptr + group * OUT, column, OUT)[None, :])
    at = row[:, None] * (GROUPS * OUT) + group * OUT + column[None, :]
    mask = (here >= 0)[:, None] & (column < OUT)[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, saturated(total, out_ptr.dtype.element_ty), mask=mask)
