"""A transformer block of the flow in three launches instead of five, for few rows.

With few rows a launch takes little longer with more work in it, so a block's five kernels become three:
queries, keys and values (`packed_linear`); attention and output projection (`attend_project`); the sum over
the heads, the residual sum, norm and both linear layers (`feed_forward`).

For which numbers of rows this is faster is measured by scripts/tune_flow_blocks.py; without measurements a
block is computed in five launches.

A program of `feed_forward` computes a part of the hidden channels. The last one of a tile of rows adds up
what all of them have computed (see arrival.py), so the order of summation is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import configs, overlap
from light_tts.kernels.arrival import is_last
from light_tts.kernels.flow.packed_linear import gelu, layer_norm, vector, weight_tile
from light_tts.kernels.launch import measured_for_rows, measured_up_to

MAX_SPLITS = 16  # programs that share a tile of rows in `feed_forward`
MIN_ROWS = 16  # of a tile


def fused_queries(device: torch.device, dtype: torch.dtype, rows: int, pages: bool = False) -> int | None:
    """Return the number of queries of a program of the attention if a block of this number of rows is
    computed in three launches; None: it is computed in five. `pages`: with cached state of earlier frames.
    The entries "fused_block" have "launches", 3 or 5, and if there are 3 "BLOCK_ROWS", the queries, and
    "pages", true where three were also measured with pages."""
    entry = measured_up_to(configs.entries("fused_block", device, dtype), rows=rows)
    fused = entry is not None and entry["launches"] == 3 and (not pages or entry.get("pages", False))
    return entry["BLOCK_ROWS"] if entry is not None and fused else None


def most_fused_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Return the largest number of rows of a block in three launches, 0 if there are none."""
    entries = configs.entries("fused_block", device, dtype)
    return max((entry["rows"] for entry in entries if entry["launches"] == 3), default=0)


@dataclass(frozen=True)
class FeedBuffers:
    """Memory of `feed_forward` for a number of rows; not shared between streams. sums: (MAX_SPLITS, rows,
    width) float32; counters: (tiles,) int32, zero between kernels."""

    sums: Tensor
    counters: Tensor

    @classmethod
    def of(cls, rows: int, width: int, device: torch.device) -> FeedBuffers:
        return cls(
            torch.empty(MAX_SPLITS, rows, width, device=device),
            torch.zeros(triton.cdiv(rows, MIN_ROWS), dtype=torch.int32, device=device),
        )


def feed_forward(
    x: Tensor,
    projected: Tensor,
    out_bias: Tensor,
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    position: Tensor,
    buffers: FeedBuffers,
    normal: Tensor,
    eps: float,
) -> Tensor:
    """x += projected.sum(0) + out_bias, then x += gelu(norm(x) @ up) @ down, in place; normal receives the
    norm of the result. Norms are LayerNorms without gain and offset, which are folded into the linear layers
    after them.

    x: (rows, width), may be strided; projected: (heads, rows, width), from `attend_project`; out_bias:
    (width,) float32; up, down: weight (in, out) and bias (out,) float32; position: (rows,) int32, rows with
    negative position are skipped; buffers: for at least as many rows; normal: (rows, width)."""
    rows, width = x.shape
    feed = up[0].shape[1]
    config = measured_for_rows(f"feed_forward_{width}x{feed}", x, rows) or {
        "BLOCK_ROWS": 16 if rows <= 256 else 32,
        "BLOCK_FEED": 128,
        "SPLITS": 8,
        "EARLY": int(triton.cdiv(feed, 8) <= 128),
        "num_warps": 8 if rows <= 256 else 16,
        "num_stages": 2,
    }
    config["BLOCK_FEED"] = min(config["BLOCK_FEED"], max(16, triton.next_power_of_2(feed)))
    config["SPLITS"] = min(config["SPLITS"], triton.cdiv(feed, config["BLOCK_FEED"]))
    _feed_forward_kernel[(triton.cdiv(rows, config["BLOCK_ROWS"]), config["SPLITS"])](
        x,
        x.stride(0),
        projected,
        out_bias,
        *up,
        *down,
        position,
        buffers.sums,
        buffers.counters,
        normal,
        rows,
        eps,
        HEADS=len(projected),
        WIDTH=width,
        FEED=feed,
        BLOCK_WIDTH=max(16, triton.next_power_of_2(width)),
        **config,
        **overlap.options(x.device, "feed_forward", rows),
    )
    return x


def feed_forward_reference(
    x: Tensor,
    projected: Tensor,
    out_bias: Tensor,
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    position: Tensor,
    buffers: FeedBuffers,
    normal: Tensor,
    eps: float,
) -> Tensor:
    inside = position >= 0
    total = x.float() + projected.float().sum(0) + out_bias
    hidden = F.gelu(F.layer_norm(total, total.shape[1:], eps=eps) @ up[0].float() + up[1])
    total = total + hidden @ down[0].float() + down[1]
    x[inside] = total[inside].to(x.dtype)
    normal[inside] = F.layer_norm(total, total.shape[1:], eps=eps)[inside].to(normal.dtype)
    return x


@triton.jit
def _feed_forward_kernel(
    x_ptr,
    x_stride,
    projected_ptr,
    out_bias_ptr,
    up_ptr,
    up_bias_ptr,
    down_ptr,
    down_bias_ptr,
    position_ptr,
    sums_ptr,
    counters_ptr,
    normal_ptr,
    rows,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    FEED: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEED: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr = False,
    OVERLAP: tl.constexpr = False,
):
    """EARLY: a program loads its weights, BLOCK_FEED hidden channels, before it waits."""
    PART: tl.constexpr = (FEED + SPLITS * BLOCK_FEED - 1) // (SPLITS * BLOCK_FEED) * BLOCK_FEED
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = tl.load(position_ptr + row, mask=row < rows, other=-1) >= 0
    if OVERLAP and not EARLY:
        for start in tl.static_range(0, PART, BLOCK_FEED):
            first = split * PART + start
            overlap.prefetch_columns(up_ptr, first, WIDTH, FEED, BLOCK_FEED)
            if first + BLOCK_FEED <= FEED:
                overlap.prefetch_columns(down_ptr + first * WIDTH, 0, BLOCK_FEED, WIDTH, BLOCK_WIDTH)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    added = vector(out_bias_ptr, column, WIDTH)
    down_added = vector(down_bias_ptr, column, WIDTH)
    if EARLY:
        tl.static_assert(PART == BLOCK_FEED)
        channel = split * PART + tl.arange(0, BLOCK_FEED)
        up = weight_tile(up_ptr, column, channel, WIDTH, FEED)
        up_added = vector(up_bias_ptr, channel, FEED)
        down = weight_tile(down_ptr, channel, column, FEED, WIDTH)
    if OVERLAP:
        overlap.begin()
    mask = inside[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    x_at = x_ptr + row[:, None] * x_stride + column[None, :]
    total = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + added[None, :]
    for head in tl.static_range(HEADS):
        total += tl.load(projected_ptr + head * rows * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    normal = layer_norm(total, column, WIDTH, eps).to(up_ptr.dtype.element_ty)
    y = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for start in range(0, PART, BLOCK_FEED):
        if not EARLY:
            channel = split * PART + start + tl.arange(0, BLOCK_FEED)
            up = weight_tile(up_ptr, column, channel, WIDTH, FEED)
            up_added = vector(up_bias_ptr, channel, FEED)
        hidden = tl.dot(normal, up, input_precision="ieee") + up_added[None, :]
        hidden = gelu(hidden, x_ptr.dtype.element_ty == tl.float32).to(up_ptr.dtype.element_ty)
        if not EARLY:
            down = weight_tile(down_ptr, channel, column, FEED, WIDTH)
        y = tl.dot(hidden, down, y, input_precision="ieee")
    if SPLITS == 1:
        total += y + down_added[None, :]
        _finish(total, x_at, normal_ptr + at, mask, column, WIDTH, eps)
    else:
        y = tl.where(split == 0, y + (total + down_added[None, :]), y)
        tl.store(sums_ptr + split * rows * WIDTH + at, y, mask=mask)
        if is_last(counters_ptr + tile, SPLITS):
            y = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
            for part in tl.static_range(SPLITS):
                y += tl.load(sums_ptr + part * rows * WIDTH + at, mask=mask, other=0.0, cache_modifier=".cg")
            _finish(y, x_at, normal_ptr + at, mask, column, WIDTH, eps)


@triton.jit
def _finish(total, x_at, normal_at, mask, column, WIDTH: tl.constexpr, eps):
    """Store `total` and its norm."""
    tl.store(x_at, total.to(x_at.dtype.element_ty), mask=mask)
    normal = layer_norm(total, column, WIDTH, eps)
    tl.store(normal_at, normal.to(normal_at.dtype.element_ty), mask=mask)
