"""A linear layer for one or two rows, fused with the surrounding operations.

Such a layer takes as long as reading its weight. Each program loads all inputs of a few outputs into
registers at once, so that the memory always has enough outstanding requests. With overlapping kernels (see
overlap.py) it does so before the rows are available.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import configs, overlap
from light_tts.kernels.launch import Config, measured

MAX_FEW = 2  # rows; more are slower than tensor cores (4 rows: 0.82 instead of 0.71 ms a step on an H100)


@cache
def row_config(device: torch.device, outputs: int, inputs: int, rows: int) -> Config:
    """Return the configuration for a weight (outputs, inputs) and this number of rows. A program computes
    BLOCK_OUT outputs and, in a gated layer, their gates. The result is shared: do not modify it."""
    entries = configs.load(device).get("row_linear", [])
    found = measured(entries, outputs=outputs, inputs=inputs, rows=rows)
    if found is not None:
        return found
    if inputs > 2048:
        return {"BLOCK_OUT": 2, "num_warps": 8}
    return {"BLOCK_OUT": 8 if rows == 1 and outputs > 4096 else 4, "num_warps": 4}


def row_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    eps: float | None = None,
    gated: bool = False,
    add: bool = False,
    config: Config | None = None,
) -> None:
    """Write x @ weight.T + bias to `out`, or add it to `out` with `add`. With `eps`, x is divided by its root
    mean square first; `gated`: the upper half of the weight is that of the gate, and out = silu(gate) * up.

    x: (rows, inputs) of at most MAX_FEW rows; weight: (outputs, inputs), gated: (2 * outputs, inputs); out:
    (rows, outputs); bias: (outputs,)
    """
    (rows, outputs), inputs = out.shape, x.shape[1]
    row_block = triton.next_power_of_2(rows)
    config = config or row_config(x.device, *weight.shape, row_block)
    _row_linear_kernel[(triton.cdiv(outputs, config["BLOCK_OUT"]),)](
        x,
        weight,
        bias,
        out,
        rows,
        eps or 0.0,
        OUTPUTS=outputs,
        INPUTS=inputs,
        ROWS=row_block,
        BLOCK_IN=triton.next_power_of_2(inputs),
        NORM=eps is not None,
        GATED=gated,
        ADD=add,
        **config,
        **overlap.options(x.device, "llm", len(x)),
    )


@triton.jit(do_not_specialize=["rows"])
def _row_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    eps,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_exists = o < OUTPUTS
    i = tl.arange(0, BLOCK_IN)
    inside = i < INPUTS
    weight_ptrs = weight_ptr + o[:, None].to(tl.int64) * INPUTS + i[None, :]
    mask = o_exists[:, None] & inside[None, :]
    weight = tl.load(weight_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        gate_weight = weight
        weight = tl.load(weight_ptrs + OUTPUTS * INPUTS, mask=mask, other=0.0, eviction_policy="evict_first")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o, mask=o_exists, other=0.0).to(tl.float32)
    if OVERLAP:
        overlap.begin()
    else:
        tl.debug_barrier()  # otherwise the compiler would wait for x between these loads

    r = tl.arange(0, ROWS)
    out_ptrs = out_ptr + r[None, :] * OUTPUTS + o[:, None]
    out_mask = o_exists[:, None] & (r < rows)[None, :]
    if ADD:
        before = tl.load(out_ptrs, mask=out_mask, other=0.0).to(tl.float32)
    if NORM:
        all_x = tl.load(
            x_ptr + r[:, None] * INPUTS + i[None, :], mask=(r < rows)[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        scale = tl.rsqrt(tl.sum(all_x * all_x, 1) / INPUTS + eps)[None, :]
    out = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
    gate = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * INPUTS + i, mask=inside & (row < rows), other=0.0).to(tl.float32)[None, :]
        out = tl.where(r[None, :] == row, tl.sum(weight.to(tl.float32) * x, 1)[:, None], out)
        if GATED:
            gate = tl.where(r[None, :] == row, tl.sum(gate_weight.to(tl.float32) * x, 1)[:, None], gate)
    if NORM:
        out *= scale
    if GATED:
        gate *= scale
        out = gate * tl.sigmoid(gate) * out
    if bias_ptr is not None:
        out += bias[:, None]
    if ADD:
        out += before
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=out_mask)
