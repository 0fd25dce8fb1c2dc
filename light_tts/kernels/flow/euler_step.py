"""The end of one Euler step of the flow: output projection, guidance and the next state in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.flow.row_tiles import vector, weight_tile


def flow_step(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    guidance: float,
    dt: Tensor,
    step: Tensor,
    position: Tensor,
    x: Tensor,
    inputs: Tensor,
) -> None:
    """x += dt[step] * ((1 + guidance) * v_conditioned - guidance * v_unconditioned) with v = h @ weight +
    bias. The new x is also written to the first columns of the next step's `inputs`, in both copies.

    h: (2 * rows, width), conditioned rows first; weight: (width, mels); bias: (mels,) float32; dt: (steps,)
    float32; step: one int32; position: (2 * rows,) int32, rows with negative position are skipped; x: (rows,
    mels) float32; inputs: (2 * rows, at least mels).
    """
    rows, mels = x.shape
    block_rows = 16 if rows <= 2048 else 32
    _flow_step_kernel[(triton.cdiv(rows, block_rows),)](
        h,
        weight,
        bias,
        guidance,
        dt,
        step,
        position,
        x,
        inputs,
        inputs.stride(0),
        rows,
        WIDTH=h.shape[1],
        MELS=mels,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=min(64, max(16, triton.next_power_of_2(h.shape[1]))),
        BLOCK_MELS=max(16, triton.next_power_of_2(mels)),
        num_warps=4,
        num_stages=2 if h.shape[1] <= 256 else 4,  # wide rows: more tiles in flight
        **overlap.options(h.device, "flow_step", len(h)),
    )


def flow_step_reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    guidance: float,
    dt: Tensor,
    step: Tensor,
    position: Tensor,
    x: Tensor,
    inputs: Tensor,
) -> None:
    rows, mels = x.shape
    conditioned, unconditioned = (h.float() @ weight.float() + bias).chunk(2)
    velocity = (1 + guidance) * conditioned - guidance * unconditioned
    inside = position[:rows] >= 0
    x[inside] += (dt[step.long()] * velocity)[inside]
    for copy in inputs.chunk(2):
        copy[:, :mels][inside] = x[inside].to(inputs.dtype)


@triton.jit
def _flow_step_kernel(
    h_ptr,
    weight_ptr,
    bias_ptr,
    guidance,
    dt_ptr,
    step_ptr,
    position_ptr,
    x_ptr,
    inputs_ptr,
    inputs_stride,
    rows,
    WIDTH: tl.constexpr,
    MELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_MELS: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = tl.load(position_ptr + row, mask=row < rows, other=-1) >= 0
    if OVERLAP:
        overlap.prefetch_columns(weight_ptr, 0, WIDTH, MELS, BLOCK_MELS)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    mel = tl.arange(0, BLOCK_MELS)
    if OVERLAP:
        added = vector(bias_ptr, mel, MELS)
        overlap.begin()
    conditioned = tl.zeros((BLOCK_ROWS, BLOCK_MELS), dtype=tl.float32)
    unconditioned = tl.zeros((BLOCK_ROWS, BLOCK_MELS), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        channel = start + tl.arange(0, BLOCK_WIDTH)
        known = inside[:, None] & (channel < WIDTH)[None, :]
        w = weight_tile(weight_ptr, channel, mel, WIDTH, MELS)
        at = h_ptr + row[:, None] * WIDTH + channel[None, :]
        conditioned = tl.dot(tl.load(at, mask=known, other=0.0), w, conditioned, input_precision="ieee")
        unconditioned = tl.dot(
            tl.load(at + rows * WIDTH, mask=known, other=0.0), w, unconditioned, input_precision="ieee"
        )
    velocity = (1.0 + guidance) * conditioned - guidance * unconditioned
    if not OVERLAP:
        added = vector(bias_ptr, mel, MELS)
    velocity += added[None, :]
    mask = inside[:, None] & (mel < MELS)[None, :]
    at = x_ptr + row[:, None] * MELS + mel[None, :]
    moved = tl.load(at, mask=mask, other=0.0) + tl.load(dt_ptr + tl.load(step_ptr)) * velocity
    tl.store(at, moved, mask=mask)
    first = inputs_ptr + row[:, None] * inputs_stride + mel[None, :]
    tl.store(first, moved.to(inputs_ptr.dtype.element_ty), mask=mask)
    tl.store(first + rows * inputs_stride, moved.to(inputs_ptr.dtype.element_ty), mask=mask)
