"""Triton functions for tiles of packed rows, which several kernels of the flow use."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

# None: none; "gelu": the exact one; "gelu_tanh": with tanh in place of erf; "silu": y * sigmoid(y)
Activation = Literal["gelu", "gelu_tanh", "silu"] | None


@triton.jit
def gelu(y, EXACT: tl.constexpr):
    """y times the normal distribution function of y. Not EXACT: erf within 1.5e-7 (Abramowitz and Stegun
    7.1.26) at a third of the cost, for results that are rounded to 16 bits anyway."""
    x = y * 0.7071067811865476
    if EXACT:
        erf = tl.erf(x)
    else:
        size = tl.abs(x)
        t = 1.0 / (1.0 + 0.3275911 * size)
        series = 1.061405429 * t - 1.453152027
        series = series * t + 1.421413741
        series = series * t - 0.284496736
        series = series * t + 0.254829592
        erf = 1.0 - series * t * tl.exp(-size * size)
        erf = tl.where(x < 0, -erf, erf)
    return 0.5 * y * (1.0 + erf)


@triton.jit
def activated(y, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """See `Activation`; EXACT: of `gelu`."""
    if ACTIVATION == "gelu":
        y = gelu(y, EXACT)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def mish(y):
    """y tanh(log(1 + e^y)) = y n / (n + 2) with n = e^y (e^y + 2); above 20 it is y"""
    e = tl.exp(tl.minimum(y, 20.0))
    n = e * (e + 2.0)
    return y * n / (n + 2.0)


@triton.jit
def saturated(y, DTYPE: tl.constexpr):
    """Convert y to DTYPE. What is beyond the finite numbers of float16 becomes the last of them; NaN stays
    NaN."""
    if y.dtype != DTYPE and tl.float16 == DTYPE:
        y = tl.clamp(y.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return y.to(DTYPE)


@triton.jit
def layer_norm(y, column, OUT: tl.constexpr, eps):
    """LayerNorm over the first OUT columns of y (rows, columns); the others must be zero."""
    mean = tl.sum(y, axis=1) / OUT
    centred = tl.where((column < OUT)[None, :], y - mean[:, None], 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / OUT + eps)[:, None]


@triton.jit
def weight_tile(weight_ptr, channel, column, IN: tl.constexpr, OUT: tl.constexpr):
    """Load rows `channel` and columns `column` of a weight (IN, OUT)."""
    return tl.load(
        weight_ptr + channel[:, None] * OUT + column[None, :],
        mask=(channel < IN)[:, None] & (column < OUT)[None, :],
        other=0.0,
    )


@triton.jit
def multiply_add(
    total,
    rows_ptr,
    weight_ptr,
    column,
    inside,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Return `total`, float32, plus the product of rows of x, where `inside`, with columns `column` of
    weight (IN, OUT). rows_ptr: the address of each row."""
    for start in range(0, IN, BLOCK_IN):
        channel = start + tl.arange(0, BLOCK_IN)
        known = channel < IN
        mask = inside[:, None] & known[None, :]
        a = tl.load(rows_ptr[:, None] + channel[None, :], mask=mask, other=0.0)
        b = weight_tile(weight_ptr, channel, column, IN, OUT)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def vector(values_ptr, column, OUT: tl.constexpr):
    """Load columns of `values_ptr`, (OUT,)."""
    return tl.load(values_ptr + column, mask=column < OUT, other=0.0)


def saturated_reference(y: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:
        y = y.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return y.to(dtype)
