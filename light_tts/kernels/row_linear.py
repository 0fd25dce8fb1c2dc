"""A linear layer for a single row, fused with what surrounds it.

Such a layer takes as long as reading its weight. Each program loads all inputs of a few outputs into
registers in one go, so that the memory always has as many requests as it can serve, and with overlapping
kernels (see overlap.py) it does so before the row is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import configs, overlap


@dataclass(frozen=True)
class RowConfig:
    """A program computes `block_out` outputs (of a gated layer: and their gates)."""

    block_out: int = 4
    warps: int = 4


@cache
def row_config(device: torch.device, outputs: int, inputs: int) -> RowConfig:
    """What was measured to be fastest for a weight (outputs, inputs) on this GPU."""
    for entry in configs.load(device).get("row_linear", []):
        if (entry["outputs"], entry["inputs"]) == (outputs, inputs):
            return RowConfig(entry["block_out"], entry["warps"])
    return RowConfig(block_out=2, warps=8) if inputs > 2048 else RowConfig(8 if outputs > 4096 else 4)


def row_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    eps: float | None = None,
    gated: bool = False,
    add: bool = False,
    config: RowConfig | None = None,
) -> None:
    """x @ weight.T + bias into `out`, or with `add` added to it. With `eps` x is divided by its root mean
    square first; `gated`: the upper half of the weight is that of the gate, and out = silu(gate) * up.

    x: (1, inputs); weight: (outputs, inputs), gated: (2 * outputs, inputs); out: (1, outputs); bias:
    (outputs,)"""
    outputs, inputs = out.shape[1], x.shape[1]
    config = config or row_config(x.device, *weight.shape)
    _row_kernel[(triton.cdiv(outputs, config.block_out),)](
        x,
        weight,
        bias,
        out,
        eps or 0.0,
        OUTPUTS=outputs,
        INPUTS=inputs,
        BLOCK_OUT=config.block_out,
        BLOCK_IN=triton.next_power_of_2(inputs),
        NORM=eps is not None,
        GATED=gated,
        ADD=add,
        num_warps=config.warps,
        **overlap.options(x.device, "llm", len(x)),
    )


@triton.jit
def _row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
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
        up = tl.load(weight_ptrs + OUTPUTS * INPUTS, mask=mask, other=0.0, eviction_policy="evict_first")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o, mask=o_exists, other=0.0).to(tl.float32)
    if OVERLAP:
        overlap.begin()
    else:
        tl.debug_barrier()  # the compiler would wait for x between these loads

    x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        before = tl.load(out_ptr + o, mask=o_exists, other=0.0).to(tl.float32)
    if NORM:
        x *= tl.rsqrt(tl.sum(x * x, 0) / INPUTS + eps)
    out = tl.sum(weight.to(tl.float32) * x[None, :], 1)
    if GATED:
        out = out * tl.sigmoid(out) * tl.sum(up.to(tl.float32) * x[None, :], 1)
    if bias_ptr is not None:
        out += bias
    if ADD:
        out += before
    tl.store(out_ptr + o, out.to(out_ptr.dtype.element_ty), mask=o_exists)
