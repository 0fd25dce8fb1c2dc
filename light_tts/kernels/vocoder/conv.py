"""The convolutions of the vocoder: one kernel, an implicit matrix product over channels-last frames.

Several convolutions of the same shape ("branches": the parallel residual blocks with different kernel sizes,
or the phases of a transposed convolution) run in one launch. For every frame q, branch b computes

    out[b, q * out_stride + shift_b] = bias_b + sum over taps k of
        in[b, q * in_stride + dilation_b * k - padding_b] @ weight_b[k]

where frames outside an item are zero on input and are not written on output. It is followed by a residual
sum, and an activation whose result is stored in addition to (or instead of) the plain one, so that the next
convolution can read its input directly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from light_tts.kernels.launch import Config
from light_tts.kernels.vocoder.conv_tiles import convolve_config
from light_tts.kernels.vocoder.layout import NO_SUMS, Active, Convolutions, Frames, Sums


def convolve(
    conv: Convolutions,
    x: Tensor,
    level_in: Frames,
    level_out: Frames,
    out: Tensor | None,
    active: Active | None = None,
    sums: Sums = NO_SUMS,
    mirror: bool = False,
    config: Config | None = None,
) -> None:
    """x: (branches or 1, batch, frames, in); out: (branches or 1, batch, frames, out), may be the residual
    itself; None: only the activated result is needed. Branches that share one `out` write different frames of
    it. `mirror`: frame 0 becomes a copy of frame 2 (a level that is padded on the left by reflection)."""
    target = _target(out, active)
    batch, capacity = target.shape[1:3]
    # a transposed convolution needs one frame more than it reads, because the last taps extend beyond the end
    steps = capacity if conv.out_stride == 1 else x.shape[2] + 1
    config = config or convolve_config(conv, batch * steps, sums)
    grid = (
        triton.cdiv(conv.channels_out, config["BLOCK_OUT"]),
        triton.cdiv(steps, config["BLOCK_FRAMES"]),
        batch * conv.branches,
    )
    branched = conv.branches if active is None else active.out.shape[0]

    def stride(tensor: Tensor | None) -> int:
        return tensor.stride(0) if tensor is not None and tensor.shape[0] == conv.branches > 1 else 0

    _convolve_kernel[grid](
        x,
        stride(x),
        x.shape[2],
        conv.weight,
        conv.bias,
        conv.table,
        # tensors that are absent are never read, so any tensor can stand in for them
        target if sums.residual is None else sums.residual,
        stride(sums.residual),
        target if sums.addend is None else sums.addend,
        target,
        stride(out),
        target if active is None else active.out,
        conv.bias if active is None or active.alpha is None else active.alpha,
        0.0 if active is None else active.slope,
        level_in.lengths,
        level_in.rate,
        level_in.extra,
        level_out.lengths,
        level_out.rate,
        level_out.extra,
        batch,
        capacity,
        IN=conv.channels_in,
        OUT=conv.channels_out,
        IN_STRIDE=conv.in_stride,
        OUT_STRIDE=conv.out_stride,
        PRECISION=conv.precision,
        RESIDUAL=sums.residual is not None,
        ADDEND=sums.addend is not None,
        PLAIN=out is not None,
        ACTIVE="none" if active is None else active.kind,
        COPIES=branched // conv.branches,
        MIRROR=mirror,
        PARTS=conv.parts,
        BLOCK_IN=conv.block_in,
        **config,
    )


def convolve_reference(
    conv: Convolutions,
    x: Tensor,
    level_in: Frames,
    level_out: Frames,
    out: Tensor | None,
    active: Active | None = None,
    sums: Sums = NO_SUMS,
    mirror: bool = False,
) -> None:
    """`convolve`, in PyTorch and float32."""
    batch, capacity = _target(out, active).shape[1:3]
    for branch, (weight, taps) in enumerate(zip(conv.weights(), conv.taps, strict=True)):
        for item in range(batch):
            known, wanted = level_in.of(item), level_out.of(item)
            frames = x[_row(x, branch, conv), item, :known].float()
            q = torch.arange(capacity + 1, device=x.device)
            total = conv.bias[branch].repeat(len(q), 1)
            for tap in range(taps.taps):
                at = q * conv.in_stride + tap * taps.dilation - taps.padding
                inside = (at >= 0) & (at < known)
                total[inside] += frames[at[inside]] @ weight[tap].float()
            at = q * conv.out_stride + taps.shift
            inside = (at >= int(mirror)) & (at < wanted)
            at, total = at[inside], total[inside]
            if sums.residual is not None:
                total = total + sums.residual[_row(sums.residual, branch, conv), item, at].float()
            if sums.addend is not None:
                total = total + sums.addend[_row(sums.addend, branch, conv), item, at].float()
            if out is not None:
                own = out[_row(out, branch, conv), item]
                own[at] = total.to(out.dtype)
                if mirror and bool((at == 2).any()):
                    own[0] = own[2]
            if active is not None:
                copies = active.out.shape[0] // conv.branches
                for row in range(branch * copies, (branch + 1) * copies):
                    active.out[row, item, at] = _activated(total, active, row).to(active.out.dtype)


def _target(out: Tensor | None, active: Active | None) -> Tensor:
    """One of the results that are wanted; they have the same frames."""
    if out is not None:
        return out
    if active is None:
        raise ValueError("nothing is wanted: give out, active or both")
    return active.out


def _row(tensor: Tensor, branch: int, conv: Convolutions) -> int:
    return branch if tensor.shape[0] == conv.branches else 0


def _activated(x: Tensor, active: Active, row: int) -> Tensor:
    if active.kind == "snake":
        assert active.alpha is not None  # see Active
        alpha = active.alpha[row]
        return x + torch.sin(x * alpha).square() / (alpha + 1e-9)
    if active.kind == "leaky_relu":
        return F.leaky_relu(x, active.slope)
    return F.elu(x) if active.kind == "elu" else x.abs()


@triton.jit
def _sin_squared(z):
    """The period is pi: a polynomial in r^2 for |r| <= pi/2 (error below 3e-7); pi is split in two, with
    eight bits in the first part, so that the reduction is exact for |z| up to some ten thousands."""
    turns = tl.floor(z * 0.3183098861837907 + 0.5)
    r = (z - turns * 3.140625) - turns * 0.0009676535897932
    u = r * r
    p = -3.6316180285211885e-06 * u + 0.00013935260358266532
    p = p * u - 0.003172405296936631
    p = p * u + 0.04444318264722824
    p = p * u - 0.3333330750465393
    return (p * u + 1.0) * u


@triton.jit
def _store(at_ptr, value, mask):
    """Saturates at the limits of float16."""
    if at_ptr.dtype.element_ty == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    tl.store(at_ptr, value.to(at_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _products(
    source,
    start,
    known,
    dilation,
    taps,
    weight,
    column,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Return the sum over taps and inputs (len(start), len(column)), in float32. start: the frames of the
    first tap."""
    IN_BLOCKS: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    inner = tl.arange(0, BLOCK_IN)
    total = tl.zeros((start.shape[0], column.shape[0]), dtype=tl.float32)
    for step in range(0, taps * IN_BLOCKS):
        row = start + (step // IN_BLOCKS) * dilation
        channel = (step % IN_BLOCKS) * BLOCK_IN + inner
        inside = ((row >= 0) & (row < known))[:, None]
        if IN % BLOCK_IN != 0:
            inside = inside & (channel < IN)[None, :]
        a = tl.load(source + row[:, None] * IN + channel[None, :], mask=inside, other=0.0)
        at = weight + (step * BLOCK_IN + inner)[:, None] * OUT + column[None, :]
        b = tl.load(at, mask=(column < OUT)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _products_in_parts(
    source,
    start,
    known,
    dilation,
    taps,
    weight,
    column,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """`_products` in eight parts, which are added at the end: with as many warps, Triton gives each of them
    one product of the batch. So a program is done sooner, and needs fewer outputs."""
    IN_BLOCKS: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN
    inner = tl.arange(0, BLOCK_IN)
    part = tl.arange(0, PARTS)
    steps = taps * IN_BLOCKS
    total = tl.zeros((PARTS, start.shape[0], column.shape[0]), dtype=tl.float32)
    for first in range(0, steps, PARTS):
        step = first + part
        row = start[None, :] + (step // IN_BLOCKS * dilation)[:, None]
        channel = (step % IN_BLOCKS * BLOCK_IN)[:, None] + inner[None, :]
        inside = ((row >= 0) & (row < known) & (step < steps)[:, None])[:, :, None]
        if IN % BLOCK_IN != 0:
            inside = inside & (channel < IN)[:, None, :]
        a = tl.load(source + row[:, :, None] * IN + channel[:, None, :], mask=inside, other=0.0)
        at = (step * BLOCK_IN)[:, None] + inner[None, :]
        b = tl.load(
            weight + at[:, :, None] * OUT + column[None, None, :],
            mask=(step < steps)[:, None, None] & (column < OUT)[None, None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.static_assert(PARTS == 8)
    # each thread gets all parts of its outputs, and adds them in the same order whatever the tile is
    parts = tl.permute(tl.reshape(total, (2, 2, 2, start.shape[0], column.shape[0])), (3, 4, 2, 1, 0))
    low, high = tl.split(parts)
    low, high = tl.split(low + high)
    low, high = tl.split(low + high)
    return low + high


@triton.jit(do_not_specialize=["batch"])  # otherwise it is recompiled for 1 and for multiples of 16
def _convolve_kernel(
    x_ptr,
    x_branch,
    x_capacity,
    weight_ptr,
    bias_ptr,
    table_ptr,
    residual_ptr,
    residual_branch,
    addend_ptr,
    out_ptr,
    out_branch,
    active_ptr,
    alpha_ptr,
    slope,
    in_lengths_ptr,
    in_rate,
    in_extra,
    out_lengths_ptr,
    out_rate,
    out_extra,
    batch,
    capacity,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    IN_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ADDEND: tl.constexpr,
    PLAIN: tl.constexpr,
    ACTIVE: tl.constexpr,
    COPIES: tl.constexpr,
    MIRROR: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    branch = tl.program_id(2) // batch
    item = tl.program_id(2) % batch
    length = tl.load(out_lengths_ptr + item)
    first_row = tl.load(table_ptr + branch * 5)
    taps = tl.load(table_ptr + branch * 5 + 1)
    dilation = tl.load(table_ptr + branch * 5 + 2)
    padding = tl.load(table_ptr + branch * 5 + 3)
    shift = tl.load(table_ptr + branch * 5 + 4)
    known = tl.load(in_lengths_ptr + item) * in_rate + in_extra
    wanted = tl.where(length > 0, length * out_rate + out_extra, 0)
    if tl.program_id(1) * BLOCK_FRAMES * OUT_STRIDE + shift >= wanted:
        return
    q = tl.program_id(1) * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)

    source = x_ptr + branch.to(tl.int64) * x_branch + item.to(tl.int64) * x_capacity * IN
    start = q * IN_STRIDE - padding
    weight = weight_ptr + first_row * OUT
    if PARTS == 1:
        total = _products(source, start, known, dilation, taps, weight, column, IN, OUT, PRECISION, BLOCK_IN)
    else:
        total = _products_in_parts(
            source, start, known, dilation, taps, weight, column, IN, OUT, PRECISION, PARTS, BLOCK_IN
        )

    total += tl.load(bias_ptr + branch * OUT + column, mask=column < OUT, other=0.0)[None, :]
    row = q * OUT_STRIDE + shift
    mask = ((row >= (1 if MIRROR else 0)) & (row < wanted))[:, None] & (column < OUT)[None, :]
    first = item.to(tl.int64) * capacity * OUT
    here = row[:, None] * OUT + column[None, :]
    if RESIDUAL:
        at = residual_ptr + (branch.to(tl.int64) * residual_branch + first) + here
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if ADDEND:
        total += tl.load(addend_ptr + first + here, mask=mask, other=0.0).to(tl.float32)
    if PLAIN:
        own = out_ptr + (branch.to(tl.int64) * out_branch + first) + here
        _store(own, total, mask)
        if MIRROR:
            _store(own - 2 * OUT, total, mask & (row == 2)[:, None])
    if ACTIVE == "leaky_relu":
        _store(active_ptr + first + here, tl.where(total > 0.0, total, total * slope), mask)
    if ACTIVE == "elu":
        value = tl.where(total > 0.0, total, tl.exp(tl.minimum(total, 0.0)) - 1.0)
        _store(active_ptr + first + here, value, mask)
    if ACTIVE == "abs":
        _store(active_ptr + first + here, tl.abs(total), mask)
    if ACTIVE == "snake":
        for copy in tl.static_range(COPIES):
            row_of = branch * COPIES + copy
            a = tl.load(alpha_ptr + row_of * OUT + column, mask=column < OUT, other=1.0)
            value = total + _sin_squared(total * a[None, :]) * (1.0 / (a + 1e-9))[None, :]
            _store(active_ptr + (row_of.to(tl.int64) * batch * capacity * OUT + first) + here, value, mask)
