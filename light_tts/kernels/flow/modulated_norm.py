"""LayerNorm of the residual stream with the shift and scale of a step, as in a diffusion transformer, over
packed rows (see packed_conv.py)."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.flow.row_tiles import layer_norm, saturated, saturated_reference, vector
from light_tts.kernels.launch import measured_for_rows


def modulated_norm(
    x: Tensor, modulation: Tensor, step: Tensor, position: Tensor, out: Tensor, eps: float
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift. x: (rows, width) float32; modulation: (steps, 2, width) float32,
    shift and scale of each step, may be strided in the first dimension; step: one int32 on the device;
    position: (rows,) int32, rows with negative position are skipped; out: (rows, width), saturates if it is
    float16."""
    rows, width = x.shape
    config = measured_for_rows(f"modulated_norm_{width}", out, rows) or {
        "BLOCK_ROWS": 1 if rows <= 1024 else 4,
        "num_warps": 4,
    }
    _modulated_norm_kernel[(triton.cdiv(rows, config["BLOCK_ROWS"]),)](
        x,
        modulation,
        modulation.stride(0),
        step,
        position,
        out,
        rows,
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        **config,
        **overlap.options(x.device, "modulated_norm", rows),
    )
    return out


def modulated_norm_reference(
    x: Tensor, modulation: Tensor, step: Tensor, position: Tensor, out: Tensor, eps: float
) -> Tensor:
    shift, scale = modulation[int(step)]
    y = F.layer_norm(x, x.shape[1:], eps=eps) * (1 + scale) + shift
    inside = position >= 0
    out[inside] = saturated_reference(y, out.dtype)[inside]
    return out


@triton.jit
def _modulated_norm_kernel(
    x_ptr,
    modulation_ptr,
    modulation_stride,
    step_ptr,
    position_ptr,
    out_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
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
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    modulation_ptr += tl.load(step_ptr) * modulation_stride
    shift, scale = vector(modulation_ptr, column, WIDTH), vector(modulation_ptr + WIDTH, column, WIDTH)
    y = layer_norm(x, column, WIDTH, eps) * (1.0 + scale)[None, :] + shift[None, :]
    tl.store(out_ptr + at, saturated(y, out_ptr.dtype.element_ty), mask=mask)
