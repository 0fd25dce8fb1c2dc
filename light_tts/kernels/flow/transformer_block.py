"""A transformer block of the flow in one kernel, from its queries, keys and values to those of the next block
(transformer_block.cu), for an H100 or H200.

Between two attentions everything is computed row by row, so a tile of rows, whichever sequences they belong
to, needs no other rows, only all the weights: 2.1 MB. They are divided among a cluster of eight
multiprocessors, which exchange the tile's rows through their shared memory. That is faster than through
global memory, from one kernel to the next.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from light_tts.kernels import overlap
from light_tts.kernels.cuda.kernel import Kernel, available
from light_tts.kernels.flow.layer_norm_linear import layer_norm_linear_reference
from light_tts.kernels.flow.packed_attention import CachedKeys, attention_of_rows_reference
from light_tts.kernels.flow.packed_linear import packed_linear_add_reference_

SOURCE = Path(__file__).with_suffix(".cu")
BLOCKS = 8  # of a cluster
WARPS = 8  # of a block
WIDTH, HEADS, HEAD, FEED = 256, BLOCKS, 64, 1024  # the only sizes that the kernel computes
INNER = HEADS * HEAD
BLOCK_ROWS = (16, 32)  # rows of a tile
CLUSTERS = 15  # that an H100 or H200 has room for, if no multiprocessor has two thread blocks

Linear = tuple[Tensor, Tensor]  # weight (in, out) and bias (out,) float32


@dataclass(frozen=True)
class BlockWeights:
    """The layers of a transformer block after its attention, and the queries, keys and values of the next
    one, None for the last block of a stage. LayerNorms are folded into the layers after them. packed: the
    same weights in the order in which the kernel loads them, float16; None without the kernel."""

    heads: int
    out: Linear
    up: Linear
    down: Linear
    next_qkv: Linear | None
    packed: tuple[Tensor, ...] | None = None

    def pack(self) -> BlockWeights:
        """Return these weights with `packed`. They must be of the kernel's sizes (see `computes`)."""
        block = torch.arange(BLOCKS)[:, None, None, None]
        warp = torch.arange(WARPS)[:, None, None]
        column = 3 * warp + torch.arange(3)
        # for each layer the steps of 16 inputs and the tiles of 8 outputs of each block and warp
        parts = [
            (_eight_in_a_row(self.out[0]), block * 4 + torch.arange(4)[:, None], warp * 4 + torch.arange(4)),
            (self.up[0], torch.arange(16)[:, None], block * 16 + warp * 2 + torch.arange(2)),
            (_eight_in_a_row(self.down[0]), block * 8 + torch.arange(8)[:, None], warp * 4 + torch.arange(4)),
        ]
        if self.next_qkv is not None:
            tiles = column // 8 * (INNER // 8) + block * 8 + column % 8
            parts.append((self.next_qkv[0], torch.arange(16)[:, None], tiles))
        packed = tuple(packed_fragments(*part) for part in parts)
        return replace(self, packed=packed)


def _eight_in_a_row(weight: Tensor) -> Tensor:
    """Return the weight with its columns exchanged such that lane t, which has columns 2t and 2t + 1 of each
    of four tiles, has what were columns 8t to 8t + 7."""
    return weight.unflatten(1, (-1, 4, 4, 2)).transpose(2, 3).flatten(1)


def packed_fragments(weight: Tensor, steps: Tensor, tiles: Tensor) -> Tensor:
    """Return (blocks, warps, registers / 4, lanes, 4, 2): two inputs in a register, as in hopper.cuh."""
    inputs, outputs = weight.shape
    # of a lane 4 g + t: inputs 2t, 2t + 1 and 2t + 8, 2t + 9 of a step, column g of a tile
    fragments = weight.view(inputs // 16, 2, 4, 2, outputs // 8, 8).permute(0, 4, 5, 2, 1, 3)
    steps, tiles = torch.broadcast_tensors(steps, tiles)
    own = fragments[steps, tiles]  # (blocks, warps, steps, tiles, g, t, 2, 2)
    own = own.flatten(4, 5).permute(0, 1, 4, 2, 3, 5, 6)  # lanes before steps
    return own.flatten(3, 5).unflatten(3, (-1, 4)).transpose(2, 3).contiguous()


def computes(device: torch.device, dtype: torch.dtype, width: int, heads: int, inner: int) -> bool:
    """Return whether the kernel computes blocks of these sizes on this device."""
    return dtype == torch.float16 and (width, heads, inner) == (WIDTH, HEADS, INNER) and available(device)


class _Params(ctypes.Structure):
    """`Params` of the kernel."""

    _fields_ = [
        ("queries", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("next_qkv", ctypes.c_void_p),
        ("weights", ctypes.c_void_p * 4),
        ("biases", ctypes.c_void_p * 4),
        ("store", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("strides", ctypes.c_uint64 * 3),
        ("x_stride", ctypes.c_uint32),
        ("copy_rows", ctypes.c_int),
        ("page_rows", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    ]


def transformer_block(
    x: Tensor,
    qkv: Tensor,
    next_qkv: Tensor,
    weights: BlockWeights,
    queries: Tensor,
    block_rows: int,
    copies: int,
    cached: CachedKeys | None,
    eps: float,
) -> None:
    """x += attention @ out; x += gelu(norm(x) @ up) @ down; next_qkv = norm(x) @ next_qkv, if there is such a
    layer. For the attention see `packed_attention`.

    x: (copies * rows, width), may be strided; qkv, next_qkv: (copies * rows, 3 * inner), not the same;
    weights: with `packed`; queries: from `attention_of_rows`, for as many rows as all tiles of a copy have;
    block_rows: of a tile, one of BLOCK_ROWS; cached: see `packed_attention`."""
    params = parameters(x, qkv, next_qkv, weights, queries, copies, cached, eps)
    tiles = len(queries) // block_rows
    resident = 2 if tiles * copies > CLUSTERS else 1
    variant = block_rows, resident, cached is not None, weights.next_qkv is not None
    kernel = _kernel(x.device, *variant)
    overlapped = overlap.enabled(x.device, "transformer_block", len(x))
    kernel.launch((BLOCKS * tiles, copies, 1), params, overlapped)


def transformer_block_reference(
    x: Tensor,
    qkv: Tensor,
    next_qkv: Tensor,
    weights: BlockWeights,
    queries: Tensor,
    block_rows: int,
    copies: int,
    cached: CachedKeys | None,
    eps: float,
) -> None:
    attended = torch.full((len(x), qkv.shape[1] // 3), torch.nan, dtype=x.dtype, device=x.device)
    attention_of_rows_reference(qkv, queries, attended, weights.heads, copies, cached)
    position = torch.where(attended[:, 0].isnan(), -1, 0)
    hidden = x.new_zeros(len(x), weights.up[0].shape[1])
    packed_linear_add_reference_(x, attended, *weights.out, position)
    layer_norm_linear_reference(x, *weights.up, position, hidden, eps, "gelu")
    packed_linear_add_reference_(x, hidden, *weights.down, position)
    if weights.next_qkv is not None:
        layer_norm_linear_reference(x, *weights.next_qkv, position, next_qkv, eps)


def parameters(
    x: Tensor,
    qkv: Tensor,
    next_qkv: Tensor,
    weights: BlockWeights,
    queries: Tensor,
    copies: int,
    cached: CachedKeys | None,
    eps: float,
) -> ctypes.Structure:
    """Return the parameters of the kernel, addresses of these tensors among them."""
    assert weights.packed is not None
    layers = [weights.out, weights.up, weights.down]
    if weights.next_qkv is not None:
        layers.append(weights.next_qkv)
    params = _Params(
        queries=queries.data_ptr(),
        x=x.data_ptr(),
        qkv=qkv.data_ptr(),
        next_qkv=next_qkv.data_ptr(),
        x_stride=x.stride(0),
        copy_rows=len(x) // copies,
        page_rows=1,
        scale=HEAD**-0.5 * 1.4426950408889634,  # for a softmax with powers of two
        eps=eps,
    )
    for index, (packed, (_, bias)) in enumerate(zip(weights.packed, layers, strict=True)):
        params.weights[index], params.biases[index] = packed.data_ptr(), bias.data_ptr()
    if cached is not None:
        params.store, params.pages = cached.store.data_ptr(), cached.pages.data_ptr()
        params.step, params.page_rows = cached.step.data_ptr(), cached.store.shape[3]
        params.strides[:] = cached.store.stride()[:3]
    return params


def macros(block_rows: int, resident: int, cached: bool, has_next: bool) -> dict[str, int]:
    """Return the macros of a variant of the kernel. resident: thread blocks of a multiprocessor, 1 or 2."""
    return {
        "TILES": block_rows // 16,
        "RESIDENT": resident,
        "CACHED": int(cached),
        "NEXT": int(has_next),
    }


def shared_bytes(block_rows: int) -> int:
    """Return the shared memory of a thread block, as the kernel divides it."""
    columns, hidden = WIDTH // BLOCKS, FEED // BLOCKS
    parts = BLOCKS * (block_rows * columns * 2 + 2 * block_rows)
    biases = (2 * columns + hidden + 3 * HEAD) * 4
    values = WARPS * 2 * 32 * (HEAD + 8) * 2
    hiddens = block_rows * (hidden + 8) * 2
    return parts + biases + 32 + hiddens + max(values, 2 * block_rows * (WIDTH + 8) * 2)


@cache
def _kernel(device: torch.device, block_rows: int, resident: int, cached: bool, has_next: bool) -> Kernel:
    return Kernel(
        SOURCE,
        "transformer_block",
        device,
        threads=32 * WARPS,
        shared_bytes=shared_bytes(block_rows),
        defines=macros(block_rows, resident, cached, has_next),
    )
