"""LayerNorm and the linear layer after it in one kernel, over packed rows (see packed_conv.py). Faster than
two kernels with few rows; see packed_linear.py for the variant for many rows.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.flow.packed_linear import packed_linear_reference
from light_tts.kernels.flow.row_tiles import Activation, activated, layer_norm, vector, weight_tile
from light_tts.kernels.launch import measured_for_rows


def layer_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    eps: float,
    activation: Activation = None,
    target: Tensor | None = None,
) -> Tensor:
    """LayerNorm without gain and offset, which are folded into `weight` and `bias` (see `fold_layer_norm`),
    linear layer and activation. x: (rows, in), rows may be strided; weight: (in, out); bias: (out,) float32;
    position: (rows,) int32, rows with negative position are skipped; out: (rows, out), rows may be strided;
    target: (rows,) int32, the row of `out` for each row of x, negative: none; None: the same."""
    rows, (width, out_width) = x.shape[0], weight.shape
    config = measured_for_rows(f"layer_norm_linear_{width}x{out_width}", x, rows)
    if config is None and width > 256:  # whole rows and their weights must fit into shared memory
        config = {
            "BLOCK_ROWS": 16 if rows <= 128 or x.element_size() > 2 else 32,
            "BLOCK_OUT": 64 if x.element_size() == 2 else 32,
            "TILES": 1,
            "num_warps": 8,
            "num_stages": 2,
        }
    config = config or {
        "BLOCK_ROWS": 32 if rows <= 1024 else 64,
        "BLOCK_OUT": 64 if rows <= 1024 else 128,
        "TILES": 1,
        "num_warps": 4 if rows <= 1024 else 8,
        "num_stages": 2,
    }
    config.setdefault("EARLY", int(config["TILES"] == 1))
    grid = (
        triton.cdiv(rows, config["BLOCK_ROWS"]),
        triton.cdiv(out_width, config["BLOCK_OUT"] * config["TILES"]),
    )
    _layer_norm_linear_kernel[grid](
        x,
        x.stride(0),
        weight,
        bias,
        position if target is None else target,
        out,
        out.stride(0),
        rows,
        eps,
        IN=width,
        OUT=out_width,
        ACTIVATION=activation,
        PLACED=target is not None,
        BLOCK_IN=max(16, triton.next_power_of_2(width)),
        **config,
        **overlap.options(x.device, "layer_norm_linear", rows),
    )
    return out


def layer_norm_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    out: Tensor,
    eps: float,
    activation: Activation = None,
    target: Tensor | None = None,
) -> Tensor:
    normal = F.layer_norm(x.float(), x.shape[1:], eps=eps)
    if target is None:
        return packed_linear_reference(normal, weight, bias, position, out, activation)
    y = packed_linear_reference(normal, weight, bias, target, out.new_zeros(len(x), out.shape[1]), activation)
    out[target[target >= 0].long()] = y[target >= 0]
    return out


def fold_layer_norm(
    gain: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return weight (in, out) and bias (out,) such that linear(layer_norm(x)) = layer_norm_without_affine(x)
    @ weight + bias. gain, offset: (in,); weight: (out, in); all float32."""
    folded = (weight * gain).T.contiguous()
    return folded, weight @ offset if bias is None else weight @ offset + bias


@triton.jit
def _layer_norm_linear_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    position_ptr,
    out_ptr,
    out_stride,
    rows,
    eps,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PLACED: tl.constexpr,
    TILES: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """PLACED: `position_ptr` has the row of `out` for each row of x. EARLY: with OVERLAP, a program loads all
    weights it needs (TILES is 1) into registers before it waits; otherwise it only prefetches them."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = tl.load(position_ptr + row, mask=row < rows, other=-1)
    inside = place >= 0
    if OVERLAP and not EARLY:
        for tile in tl.static_range(TILES):
            first = (tl.program_id(1) * TILES + tile) * BLOCK_OUT
            overlap.prefetch_columns(weight_ptr, first, IN, OUT, BLOCK_OUT)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    channel = tl.arange(0, BLOCK_IN)
    known = channel < IN
    LOADED: tl.constexpr = OVERLAP and EARLY
    if LOADED:
        column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        w = weight_tile(weight_ptr, channel, column, IN, OUT)
        added = vector(bias_ptr, column, OUT)
    if OVERLAP:
        overlap.begin()
    values = tl.load(
        x_ptr + row[:, None] * x_stride + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
    ).to(tl.float32)
    normal = layer_norm(values, channel, IN, eps).to(weight_ptr.dtype.element_ty)
    for tile in range(TILES):
        if not LOADED:
            column = (tl.program_id(1) * TILES + tile) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            w = weight_tile(weight_ptr, channel, column, IN, OUT)
        y = tl.dot(normal, w, input_precision="ieee")
        if not LOADED:
            added = vector(bias_ptr, column, OUT)
        y += added[None, :]
        y = activated(y, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
        to = place if PLACED else row
        tl.store(
            out_ptr + to[:, None] * out_stride + column[None, :],
            y.to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & (column < OUT)[None, :],
        )
