"""Linear layers for up to 64 rows, fused with the surrounding operations.

With few rows a linear layer takes as long as reading its weight. So the weight is read exactly once, by
enough programs to keep all of the GPU's memory channels busy, and the rest of a transformer block's half
(norm, bias, activation, residual) is done by the same kernel. All products are summed in float32.

The weight of a norm scales the columns of the following linear layer (see `fold_rms_norm`), so the norm
reduces to a factor per row, which may be applied after the product.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import arrival, configs, overlap
from light_tts.kernels.arrival import is_last
from light_tts.kernels.launch import Config, measured
from light_tts.kernels.llm.norm import rms_norm_reference
from light_tts.kernels.llm.row_linear import MAX_FEW, row_linear

MAX_ROWS = 64  # what tensor cores multiply at once; fewer take as long


@cache
def linear_config(weight: torch.Size, dtype: torch.dtype, device: torch.device, kernel: str) -> Config:
    """Return the configuration for a weight (outputs, inputs). A program computes BLOCK_OUT outputs of all
    rows, BLOCK_K inputs at a time; in `linear_add_`, from a SPLITS-th of the inputs. The result is shared: do
    not modify it."""
    outputs, inputs = weight
    found = measured(configs.entries(kernel, device, dtype), outputs=outputs, inputs=inputs)
    if found is not None:
        return found
    block_out = 32 if outputs > 4096 else 16
    config = {"BLOCK_OUT": block_out, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    if kernel == "linear_add_":
        tiles = triton.cdiv(outputs, block_out)
        config["SPLITS"] = min(triton.cdiv(192, tiles), triton.cdiv(inputs, 512))
    return config


def fold_rms_norm(weight: Tensor, norm_weight: Tensor) -> Tensor:
    """Return the weight (outputs, inputs) of a linear layer multiplied by the weight (inputs,) of the
    preceding norm."""
    return (weight.float() * norm_weight.float()).to(weight.dtype)


def rms_norm_linear(
    x: Tensor, eps: float, weight: Tensor, bias: Tensor | None, config: Config | None = None
) -> Tensor:
    """rms_norm(x) @ weight.T + bias. x: (rows, inputs) of at most MAX_ROWS rows; weight: (outputs, inputs),
    from `fold_rms_norm`; bias: (outputs,) or None; config: None for the measured one -> (rows, outputs).
    Raises ValueError for more rows."""
    out = x.new_empty(len(x), weight.shape[0])
    if len(x) <= MAX_FEW and config is None:
        row_linear(x, weight, out, bias, eps)
    else:
        config = config or _config(weight, "rms_norm_linear")
        _launch_norm(x, eps, weight, bias, out, False, config)
    return out


def rms_norm_linear_reference(x: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rms_norm_reference(x, eps), weight, bias)


def norm_gate_up_silu(x: Tensor, eps: float, gate_up_weight: Tensor, config: Config | None = None) -> Tensor:
    """silu(gate) * up, where both come from rms_norm(x). gate_up_weight: (2 * outputs, inputs), gate first;
    otherwise as `rms_norm_linear` -> (rows, outputs)"""
    out = x.new_empty(len(x), gate_up_weight.shape[0] // 2)
    if len(x) <= MAX_FEW and config is None:
        row_linear(x, gate_up_weight, out, eps=eps, gated=True)
    else:
        config = config or _config(gate_up_weight, "norm_gate_up_silu")
        _launch_norm(x, eps, gate_up_weight, None, out, True, config)
    return out


def norm_gate_up_silu_reference(x: Tensor, eps: float, gate_up_weight: Tensor) -> Tensor:
    gate, up = rms_norm_linear_reference(x, eps, gate_up_weight, None).float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def linear_add_(residual: Tensor, y: Tensor, weight: Tensor, config: Config | None = None) -> None:
    """residual += y @ weight.T. residual: (rows, outputs); y: (rows, inputs) of at most MAX_ROWS rows;
    weight: (outputs, inputs); config: None for the measured one. Raises ValueError for more rows."""
    (rows, inputs), outputs = y.shape, weight.shape[0]
    if rows <= MAX_FEW and config is None:
        return row_linear(y, weight, residual, add=True)
    _check(rows)
    config = config or _config(weight, "linear_add_")
    block_out, splits = config["BLOCK_OUT"], config["SPLITS"]
    tiles = triton.cdiv(outputs, block_out)
    partial = y.new_empty(tiles * splits * MAX_ROWS * block_out, dtype=torch.float32)
    _linear_add_kernel[(tiles, splits)](
        residual,
        y,
        weight,
        partial,
        arrival.counters(y.device),
        rows,
        OUTPUTS=outputs,
        INPUTS=inputs,
        ROWS=MAX_ROWS,
        **config,
        **overlap.options(y.device, "llm", rows),
    )


def linear_add_reference_(residual: Tensor, y: Tensor, weight: Tensor) -> None:
    residual += F.linear(y, weight)


def _config(weight: Tensor, kernel: str) -> Config:
    return linear_config(weight.shape, weight.dtype, weight.device, kernel)


def _check(rows: int) -> None:
    if rows > MAX_ROWS:
        raise ValueError(f"small_linear: {rows} rows, at most {MAX_ROWS}")


def _launch_norm(
    x: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    gated: bool,
    config: Config,
) -> None:
    (rows, inputs), outputs = x.shape, out.shape[1]
    _check(rows)
    _rms_norm_linear_kernel[(triton.cdiv(outputs, config["BLOCK_OUT"]),)](
        x,
        weight,
        bias,
        out,
        rows,
        eps,
        OUTPUTS=outputs,
        INPUTS=inputs,
        ROWS=MAX_ROWS,
        BIAS=bias is not None,
        GATED=gated,
        **config,
        **overlap.options(x.device, "llm", rows),
    )


@triton.jit
def _masks(input, row_exists, o_exists, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """For tiles of the rows (rows, BLOCK_K) and of the weight (BLOCK_K, outputs), at inputs `input`."""
    if INPUTS % BLOCK_K == 0:
        row_mask = row_exists[:, None]
        weight_mask = o_exists[None, :]
    else:
        inside = input < INPUTS
        row_mask = row_exists[:, None] & inside[None, :]
        weight_mask = o_exists[None, :] & inside[:, None]
    return row_mask, weight_mask


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_linear_kernel(
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
    BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """One program per tile of outputs."""
    row = tl.arange(0, ROWS)
    row_exists = row < rows
    o = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_exists = o < OUTPUTS
    i = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None] * INPUTS + i[None, :]
    weight_ptrs = weight_ptr + o[None, :].to(tl.int64) * INPUTS + i[:, None]
    up_ptrs = weight_ptrs + OUTPUTS * INPUTS

    if OVERLAP:
        first = tl.program_id(0) * BLOCK_OUT
        overlap.prefetch(weight_ptr, first, 0, OUTPUTS, INPUTS, BLOCK_OUT, INPUTS)
        if GATED:
            up_ptr = weight_ptr + OUTPUTS * INPUTS
            overlap.prefetch(up_ptr, first, 0, OUTPUTS, INPUTS, BLOCK_OUT, INPUTS)
        overlap.begin()
    squares = tl.zeros([ROWS, ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
    up_sums = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
    for start in range(0, INPUTS, BLOCK_K):
        x_mask, weight_mask = _masks(start + i, row_exists, o_exists, INPUTS, BLOCK_K)
        weight = tl.load(weight_ptrs + start, mask=weight_mask, other=0.0)
        x = tl.load(x_ptrs + start, mask=x_mask, other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        if GATED:
            up = tl.load(up_ptrs + start, mask=weight_mask, other=0.0)
            up_sums = tl.dot(x, up, up_sums, input_precision="ieee")
        # The sums of squares are the diagonal; this keeps x where the products read it.
        squares = tl.dot(x, tl.trans(x), squares, input_precision="ieee")

    squares = tl.sum(tl.where(row[:, None] == row[None, :], squares, 0.0), 1)
    scale = tl.rsqrt(squares / INPUTS + eps)[:, None]
    out = sums * scale
    if BIAS:
        out += tl.load(bias_ptr + o, mask=o_exists, other=0.0).to(tl.float32)[None, :]
    if GATED:
        out = out * tl.sigmoid(out) * (up_sums * scale)
    out_ptrs = out_ptr + row[:, None] * OUTPUTS + o[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_exists[:, None] & o_exists[None, :])


@triton.jit(do_not_specialize=["rows"])
def _linear_add_kernel(
    residual_ptr,
    y_ptr,
    weight_ptr,
    partial_ptr,
    counters_ptr,
    rows,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """One program per tile of outputs and share of the inputs; the last one to finish adds the shares in
    order."""
    SHARE: tl.constexpr = (INPUTS + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    row_exists = row < rows
    o = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_exists = o < OUTPUTS
    i = tl.arange(0, BLOCK_K)
    y_ptrs = y_ptr + row[:, None] * INPUTS + i[None, :]
    weight_ptrs = weight_ptr + o[None, :].to(tl.int64) * INPUTS + i[:, None]

    first = split * SHARE
    if OVERLAP:
        overlap.prefetch(weight_ptr, tile * BLOCK_OUT, first, OUTPUTS, INPUTS, BLOCK_OUT, SHARE)
        overlap.begin()
    out_ptrs = residual_ptr + row[:, None] * OUTPUTS + o[None, :]
    out_mask = row_exists[:, None] & o_exists[None, :]
    total = tl.load(out_ptrs, mask=out_mask, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
    for start in range(first, tl.minimum(first + SHARE, INPUTS), BLOCK_K):
        y_mask, weight_mask = _masks(start + i, row_exists, o_exists, INPUTS, BLOCK_K)
        weight = tl.load(weight_ptrs + start, mask=weight_mask, other=0.0)
        y = tl.load(y_ptrs + start, mask=y_mask, other=0.0)
        sums = tl.dot(y, weight, sums, input_precision="ieee")

    if SPLITS == 1:
        tl.store(out_ptrs, (total + sums).to(residual_ptr.dtype.element_ty), mask=out_mask)
    else:
        SIZE: tl.constexpr = ROWS * BLOCK_OUT
        partial_ptrs = partial_ptr + tile * SPLITS * SIZE
        partial_ptrs = partial_ptrs + row[:, None] * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
        tl.store(partial_ptrs + split * SIZE, sums, mask=row_exists[:, None])
        if is_last(counters_ptr + tile, SPLITS):
            for s in tl.static_range(SPLITS):
                total += tl.load(
                    partial_ptrs + s * SIZE, mask=row_exists[:, None], other=0.0, cache_modifier=".cg"
                )
            tl.store(out_ptrs, total.to(residual_ptr.dtype.element_ty), mask=out_mask)
