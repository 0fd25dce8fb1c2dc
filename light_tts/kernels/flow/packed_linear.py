"""Linear layers over packed rows (see packed_conv.py), fused with the surrounding operations in the flow's
transformer blocks and its encoder: a LayerNorm before, an activation or a residual sum after.

There are two variants of norm plus linear layer. With few rows the linear layer normalises its input
(`layer_norm_linear`). With many rows the kernel that wrote the residual stream has also written its norm
(`packed_linear_add_` with `normal`), and `packed_linear` only multiplies.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.launch import Config, measured_for_rows

# None: none; "gelu": the exact one; "silu": y * sigmoid(y)
Activation = Literal["gelu", "silu"] | None


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


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, out: Tensor, activation: Activation = None
) -> Tensor:
    """x @ weight + bias, and activation. Shapes as in `layer_norm_linear`; x and out are contiguous."""
    rows, (width, out_width) = x.shape[0], weight.shape
    config = measured_for_rows(f"packed_linear_{width}x{out_width}", x, rows) or {
        "BLOCK_ROWS": 128,
        "BLOCK_IN": 64,
        "BLOCK_OUT": 128,
        "num_warps": 8,
        "num_stages": 3,
    }
    config["BLOCK_IN"] = min(config["BLOCK_IN"], max(16, triton.next_power_of_2(width)))
    _packed_linear_kernel[_grid(rows, out_width, config)](
        x,
        weight,
        bias,
        position,
        out,
        rows,
        IN=width,
        OUT=out_width,
        ACTIVATION=activation,
        **config,
        **overlap.options(x.device, "packed_linear", rows),
    )
    return out


def packed_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, out: Tensor, activation: Activation = None
) -> Tensor:
    y = x.float() @ weight.float() + bias
    if activation is not None:
        y = F.gelu(y) if activation == "gelu" else F.silu(y)
    inside = position >= 0
    out[inside] = y[inside].to(out.dtype)
    return out


def fold_layer_norm(
    gain: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return weight (in, out) and bias (out,) such that linear(layer_norm(x)) = layer_norm_without_affine(x)
    @ weight + bias. gain, offset: (in,); weight: (out, in); all float32."""
    folded = (weight * gain).T.contiguous()
    return folded, weight @ offset if bias is None else weight @ offset + bias


def packed_linear_add_(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    normal: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """x += y @ weight + bias, in place. x: (rows, out), may be strided; y: (rows, in); weight: (in, out);
    bias: (out,) float32; position: (rows,) int32, rows with negative position are skipped; normal: (rows,
    out), receives the LayerNorm (without gain and offset) of the new x."""
    rows, (width, out_width) = y.shape[0], weight.shape
    small = rows <= (2048 if out_width <= 256 else 1024)
    if normal is None:
        config = measured_for_rows(f"packed_linear_add_{width}x{out_width}", x, rows) or {
            "BLOCK_ROWS": 16 if rows <= 256 < out_width else 32 if small else 64,
            "BLOCK_IN": 128 if small else 64,
            "BLOCK_OUT": 32 if small else 128,
            "num_warps": 4,
            "num_stages": 3,
        }
    else:
        config = measured_for_rows(f"packed_linear_add_norm_{width}x{out_width}", x, rows) or {
            "BLOCK_ROWS": 64,
            "BLOCK_IN": 64,
            "num_warps": 8,
            "num_stages": 3 if x.element_size() == 2 else 2,  # limited by shared memory
        }
        config["BLOCK_OUT"] = max(16, triton.next_power_of_2(out_width))  # a norm needs whole rows
    config["BLOCK_IN"] = min(config["BLOCK_IN"], max(16, triton.next_power_of_2(width)))
    _packed_linear_add_kernel[_grid(rows, out_width, config)](
        x,
        x.stride(0),
        y,
        weight,
        bias,
        position,
        x if normal is None else normal,
        rows,
        eps,
        IN=width,
        OUT=out_width,
        NORM=normal is not None,
        **config,
        **overlap.options(x.device, "packed_linear_add", rows),
    )
    return x


def packed_linear_add_reference_(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    normal: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    inside = position >= 0
    total = x.float() + y.float() @ weight.float() + bias
    x[inside] = total[inside].to(x.dtype)
    if normal is not None:
        normal[inside] = F.layer_norm(total, total.shape[1:], eps=eps)[inside].to(normal.dtype)
    return x


def _grid(rows: int, out_width: int, config: Config) -> tuple[int, int]:
    return triton.cdiv(rows, config["BLOCK_ROWS"]), triton.cdiv(out_width, config["BLOCK_OUT"])


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
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


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


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    row,
    column,
    inside,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rows `row` of x (rows, IN), where `inside`, times columns `column` of the weight, plus bias: float32.
    With OVERLAP it waits for the kernel in front before it reads x; if BLOCK_IN includes all inputs, it loads
    the weights first."""
    EARLY: tl.constexpr = OVERLAP and BLOCK_IN >= IN
    if OVERLAP:
        added = vector(bias_ptr, column, OUT)
        if EARLY:
            channel = tl.arange(0, BLOCK_IN)
            w = weight_tile(weight_ptr, channel, column, IN, OUT)
        overlap.begin()
    if EARLY:
        mask = inside[:, None] & (channel < IN)[None, :]
        x = tl.load(x_ptr + row[:, None] * IN + channel[None, :], mask=mask, other=0.0)
        total = tl.dot(x, w, input_precision="ieee")
    else:
        total = tl.zeros((row.shape[0], column.shape[0]), dtype=tl.float32)
        total = multiply_add(total, x_ptr + row * IN, weight_ptr, column, inside, IN, OUT, BLOCK_IN)
    if not OVERLAP:
        added = vector(bias_ptr, column, OUT)
    return total + added[None, :]


@triton.jit
def _packed_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    out_ptr,
    rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = tl.load(position_ptr + row, mask=row < rows, other=-1) >= 0
    if OVERLAP:
        overlap.prefetch_columns(weight_ptr, tl.program_id(1) * BLOCK_OUT, IN, OUT, BLOCK_OUT)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    y = _product(x_ptr, weight_ptr, bias_ptr, row, column, inside, IN, OUT, BLOCK_IN, OVERLAP)
    y = activated(y, ACTIVATION, out_ptr.dtype.element_ty == tl.float32)
    tl.store(
        out_ptr + row[:, None] * OUT + column[None, :],
        y.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < OUT)[None, :],
    )


@triton.jit
def _packed_linear_add_kernel(
    x_ptr,
    x_stride,
    y_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    normal_ptr,
    rows,
    eps,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = tl.load(position_ptr + row, mask=row < rows, other=-1) >= 0
    if OVERLAP:
        overlap.prefetch_columns(weight_ptr, tl.program_id(1) * BLOCK_OUT, IN, OUT, BLOCK_OUT)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    total = _product(y_ptr, weight_ptr, bias_ptr, row, column, inside, IN, OUT, BLOCK_IN, OVERLAP)
    at = x_ptr + row[:, None] * x_stride + column[None, :]
    mask = inside[:, None] & (column < OUT)[None, :]
    total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(x_ptr.dtype.element_ty), mask=mask)
    if NORM:
        total = layer_norm(total, column, OUT, eps)
        at = normal_ptr + row[:, None] * OUT + column[None, :]
        tl.store(at, total.to(normal_ptr.dtype.element_ty), mask=mask)
