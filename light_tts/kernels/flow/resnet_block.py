"""A residual block of the flow in one kernel, with the queries, keys and values of the transformer block that
follows it (resnet_block.cu), for an H100 or H200.

As in transformer_block.py, a cluster of eight multiprocessors has all the weights and computes a tile of
rows. A convolution reads two earlier rows; each tile computes those of the second convolution again, so that
no tile waits for another. A tile has consecutive rows, of whatever sequences, each of which is preceded by
two rows that stand for the frames before it (see `lines_of`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.cuda.kernel import Kernel, available
from light_tts.kernels.flow.packed_conv import CachedEdges, Norm, Residual, Shift, packed_conv_reference
from light_tts.kernels.flow.packed_linear import packed_linear_reference
from light_tts.kernels.flow.transformer_block import (
    BLOCKS,
    HEAD,
    INNER,
    WARPS,
    WIDTH,
    Linear,
    packed_fragments,
)

SOURCE = Path(__file__).with_suffix(".cu")
TAPS = 3
HALO = TAPS - 1  # earlier rows that a convolution reads
UNUSED = -1  # a line that is no row and no edge
INPUTS = (256, 320, 512)  # channels that the kernel computes, as the width and the number of taps
BLOCK_ROWS = (16, 32, 48, 64)  # rows of a tile of the first convolution
COLUMNS = WIDTH // BLOCKS


def new_rows(block_rows: int) -> int:
    """Return the lines of the result that a tile yields."""
    return block_rows - HALO


def line_count(frames: int, block_rows: int) -> int:
    """Return the lines of tiles that are enough for `frames` frames of one sequence, or as many lines."""
    new = new_rows(block_rows)
    return -(-frames // new) * new + 2 * HALO


def has_room(count: int, lengths: Sequence[int]) -> bool:
    """Return whether sequences of these lengths fit into `count` lines."""
    return sum(lengths) + HALO * (len(lengths) + 1) <= count


def lines_of(lengths: Sequence[int], count: int, before: np.ndarray | None = None) -> np.ndarray:
    """Return (count,) int32, what the convolutions go over: the rows of a copy of the batch, and before the
    first row of each sequence its edge, HALO lines that stand for the frames before it. A line is the index
    of a row; UNUSED; or, of an edge, UNUSED - 1 - HALO - (page * HALO + place), where page -1 stands for
    zeros. before: (rows,), see CachedEdges; None: every sequence begins. Raises ValueError if `count` is too
    small, see `has_room`."""
    if not has_room(count, lengths):
        raise ValueError(f"{len(lengths)} sequences of {sum(lengths)} rows do not fit into {count} lines")
    lines = np.full(count, UNUSED, np.int32)
    line, row = HALO, 0  # a tile's first new line is the one after 2 * HALO others
    for length in lengths:
        page = -1 if before is None else before[row]
        lines[line : line + HALO] = UNUSED - 1 - HALO - (page * HALO + np.arange(HALO))
        line += HALO
        lines[line : line + length] = np.arange(row, row + length)
        line, row = line + length, row + length
    return lines


@dataclass(frozen=True)
class ResnetWeights:
    """The layers of a residual block, and the queries, keys and values after it. Weights of convolutions:
    (taps, in, out). The LayerNorm before the queries is folded into them. shift: (steps, width) float32, the
    contribution of the time. packed: the same weights in the order in which the kernel loads them, float16,
    and the vectors of each thread block, (BLOCKS, numbers) float32; None without the kernel."""

    first: Linear
    first_norm: Norm
    shift: Tensor
    second: Linear
    second_norm: Norm
    side: Linear
    qkv: Linear
    packed: tuple[Tensor, ...] | None = None

    def pack(self) -> ResnetWeights:
        """Return these weights with `packed`. They must be of the kernel's sizes (see `computes`)."""
        inputs = self.side[0].shape[0]
        block = torch.arange(BLOCKS)[:, None, None, None]
        warp = torch.arange(WARPS)[:, None, None]
        own = block * 4 + torch.arange(4)

        def steps(taps: int, channels: int) -> Tensor:
            """Return those of each warp; the last of a tap may be unused, and then is any step."""
            count = channels // 16
            of_warp = warp + torch.arange(0, count, WARPS)[:, None]
            return torch.cat([tap * count + of_warp.clamp(max=count - 1) for tap in range(taps)], 1)

        column = 3 * warp + torch.arange(3)
        head = column // 8 * (INNER // 8) + block * 8 + column % 8
        packed = (
            packed_fragments(self.first[0].flatten(0, 1), steps(TAPS, inputs), own),
            packed_fragments(self.second[0].flatten(0, 1), steps(TAPS, WIDTH), own),
            packed_fragments(self.side[0], steps(1, inputs), own),
            packed_fragments(self.qkv[0], torch.arange(16)[:, None], head),
            self._vectors(),
        )
        return replace(self, packed=packed)

    def _vectors(self) -> Tensor:
        """Return (BLOCKS, numbers): the biases of the block's columns, gains and offsets, and the bias of its
        head."""
        biases = [bias.view(BLOCKS, COLUMNS) for _, bias in (self.first, self.second, self.side)]
        norms = [
            vector for norm in (self.first_norm, self.second_norm) for vector in (norm.weight, norm.bias)
        ]
        head = self.qkv[1].view(3, BLOCKS, HEAD).transpose(0, 1).flatten(1)
        return torch.cat([*biases, *(vector.expand(BLOCKS, -1) for vector in norms), head], 1).contiguous()


def computes(device: torch.device, dtype: torch.dtype, weights: ResnetWeights) -> bool:
    """Return whether the kernel computes blocks of these sizes on this device."""
    taps, inputs, width = weights.first[0].shape
    sizes = taps == TAPS and inputs in INPUTS and (width, weights.qkv[0].shape[1]) == (WIDTH, 3 * INNER)
    return dtype == torch.float16 and sizes and available(device)


class _Params(ctypes.Structure):
    """`Params` of the kernel."""

    _fields_ = [
        ("lines", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("weights", ctypes.c_void_p * 4),
        ("vectors", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("edges", ctypes.c_void_p * 2),
        ("keep", ctypes.c_void_p),
        ("x_stride", ctypes.c_uint32),
        ("out_stride", ctypes.c_uint32),
        ("copy_rows", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("new_step", ctypes.c_int),
        ("norm_eps", ctypes.c_float * 2),
        ("eps", ctypes.c_float),
    ]


Edges = tuple[CachedEdges, CachedEdges]


def resnet_block(
    x: Tensor,
    out: Tensor,
    qkv: Tensor,
    weights: ResnetWeights,
    lines: Tensor,
    block_rows: int,
    copies: int,
    step: Tensor,
    cached: Edges | None,
    eps: float,
    new_step: bool = True,
) -> None:
    """out = mish(norm(conv(mish(norm(conv(x))) + shift[step]))) + x @ side; qkv = norm(out) @ qkv, that norm
    without gain and offset and with `eps`. For the convolutions see `packed_conv`.

    x: (copies * rows, in), out: (copies * rows, width), both may be strided, must not overlap; qkv: (copies *
    rows, 3 * inner); weights: with `packed`; lines: from `lines_of`, as many as `line_count` returns for some
    number of frames; block_rows: one of BLOCK_ROWS; step: one int32 on the device; cached: of both
    convolutions, None if every sequence begins in the batch and nothing is cached; new_step: whether the
    previous kernel may have written `step`."""
    params = parameters(x, out, qkv, weights, lines, copies, step, cached, eps, new_step)
    kernel = _kernel(x.device, block_rows, cached is not None, x.shape[1])
    overlapped = overlap.enabled(x.device, "resnet_block", len(x))
    kernel.launch((BLOCKS * tile_count(lines, block_rows), copies, 1), params, overlapped)


def tile_count(lines: Tensor, block_rows: int) -> int:
    """Return the number of tiles of these lines."""
    return (len(lines) - 2 * HALO) // new_rows(block_rows)


def resnet_block_reference(
    x: Tensor,
    out: Tensor,
    qkv: Tensor,
    weights: ResnetWeights,
    lines: Tensor,
    block_rows: int,
    copies: int,
    step: Tensor,
    cached: Edges | None,
    eps: float,
    new_step: bool = True,
) -> None:
    position, before = (each.repeat(copies) for each in _layout(lines, len(x) // copies))
    first, second = (None, None) if cached is None else (replace(each, before=before) for each in cached)
    between, normal = (torch.zeros(len(x), out.shape[1], dtype=x.dtype, device=x.device) for _ in range(2))
    shift, side = Shift(weights.shift, step), Residual(x, *weights.side)
    packed_conv_reference(x, *weights.first, position, between, weights.first_norm, shift=shift, cached=first)
    packed_conv_reference(
        between,
        *weights.second,
        position,
        out,
        weights.second_norm,
        residual=side,
        normal=normal,
        eps=eps,
        cached=second,
    )
    packed_linear_reference(normal, *weights.qkv, position, qkv)


def _layout(lines: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the position of each row in its sequence, -1 for rows that are in no line, and the page before
    its sequence, -1: none. (rows,) int32"""
    position, before, frame, page = [-1] * rows, [-1] * rows, 0, -1
    for line in lines.tolist():
        if line >= 0:
            position[line], before[line], frame = frame, page, frame + 1
        elif line < UNUSED:
            frame, page = 0, (UNUSED - 1 - HALO - line) // HALO
    table = torch.tensor([position, before], dtype=torch.int32, device=lines.device)
    return table[0], table[1]


def parameters(
    x: Tensor,
    out: Tensor,
    qkv: Tensor,
    weights: ResnetWeights,
    lines: Tensor,
    copies: int,
    step: Tensor,
    cached: Edges | None,
    eps: float,
    new_step: bool = True,
) -> ctypes.Structure:
    """Return the parameters of the kernel, addresses of these tensors among them."""
    assert weights.packed is not None
    *layers, vectors = weights.packed
    params = _Params(
        lines=lines.data_ptr(),
        x=x.data_ptr(),
        out=out.data_ptr(),
        qkv=qkv.data_ptr(),
        vectors=vectors.data_ptr(),
        shift=weights.shift.data_ptr(),
        step=step.data_ptr(),
        x_stride=x.stride(0),
        out_stride=out.stride(0),
        copy_rows=len(x) // copies,
        new_step=new_step,
        eps=eps,
    )
    params.weights[:] = [layer.data_ptr() for layer in layers]
    params.norm_eps[:] = [weights.first_norm.eps, weights.second_norm.eps]
    if cached is not None:
        params.edges[:] = [edges.store.data_ptr() for edges in cached]
        params.keep = cached[0].keep.data_ptr()
        params.steps = cached[0].store.shape[1]
    return params


def macros(block_rows: int, cached: bool, inputs: int) -> dict[str, int]:
    """Return the macros of a variant of the kernel."""
    return {"TILES": block_rows // 16, "CACHED": int(cached), "INPUTS": inputs}


def shared_bytes(block_rows: int, inputs: int) -> int:
    """Return the shared memory of a thread block, as the kernel divides it."""
    x = (block_rows + 2 * HALO) * (inputs + 8) * 2
    wide = (2 * block_rows + HALO) * (WIDTH + 8) * 2
    parts = WARPS * block_rows * (COLUMNS + 8) * 4
    numbers = 3 * COLUMNS + 4 * WIDTH + 3 * HEAD
    return x + wide + parts + numbers * 4 + 3 * 8 + (block_rows + HALO) * 4


@cache
def _kernel(device: torch.device, block_rows: int, cached: bool, inputs: int) -> Kernel:
    return Kernel(
        SOURCE,
        "resnet_block",
        device,
        threads=32 * WARPS,
        shared_bytes=shared_bytes(block_rows, inputs),
        defines=macros(block_rows, cached, inputs),
    )
