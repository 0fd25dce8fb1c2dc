"""Letting a kernel begin before the one in front of it has ended (programmatic dependent launch, from Hopper
on): it is launched early, fetches its weights into the L2 cache, and only then waits.

In a chain of small kernels this hides their launch and keeps the memory busy. From large ones the waiting
programs take room that they could use, so it is chosen by size.

A kernel of such a chain calls `begin` before it writes anything, and before it reads what a kernel of the
chain writes. Weights and tables that say where the batch lies may be read earlier; but not even they may come
from the kernel in front, whose results are only sure to be seen after the wait, ended or not. Every kernel
waits, so that none runs ahead of two others. Loads stay on their side of the wait: Triton makes both of them
volatile assembly, which is not reordered.

A program that has nothing to do may return before `begin`: a grid ends with its last program, thus not before
those that wait. Were all programs to return, the kernel behind would no longer wait for those in front; but
the flow's kernels agree about which rows exist, so then (a graph is recorded without a sequence) none of them
has any data.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from light_tts.kernels import configs


def enabled(device: torch.device, kernel: str, rows: int) -> bool:
    """Whether it was measured to be faster for so many rows on this GPU: for "llm", all kernels of a decode
    step (rows: tokens of the batch), or for one of the flow's (rows of the packed batch, all copies)."""
    ranges = configs.load(device).get("overlap", {}).get(kernel, [])
    return any(first <= rows <= last for first, last in ranges)


def options(device: torch.device, kernel: str, rows: int) -> dict[str, bool]:
    """What to pass to a kernel that has the parameter `OVERLAP: tl.constexpr = False`. The kernel in front
    may be any: one that does not call `begin` is waited for before this one is launched."""
    return {"OVERLAP": True, "launch_pdl": True} if enabled(device, kernel, rows) else {}


@triton.jit
def begin():
    """Lets the next kernel begin and waits for all results of the one in front."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(
    weight_ptr,
    output,
    input,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Fetches the inputs [input, input + SHARE) of BLOCK_OUT rows from `output` on of a weight (OUTPUTS,
    INPUTS) into L2, each thread a piece of a row."""
    SIZE: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    THREADS: tl.constexpr = tl.extra.cuda.num_threads()
    PIECES: tl.constexpr = (THREADS + BLOCK_OUT - 1) // BLOCK_OUT
    PIECE: tl.constexpr = ((SHARE + PIECES - 1) // PIECES * SIZE + 15) // 16 * 16 // SIZE
    if INPUTS * SIZE % 16 == 0:  # pieces are counted in 16 bytes
        thread = tl.arange(0, THREADS)
        row = output + thread % BLOCK_OUT
        start = input + thread // BLOCK_OUT * PIECE
        end = tl.minimum(tl.minimum(start + PIECE, input + SHARE), INPUTS)
        size = tl.where(row < OUTPUTS, (end - start) * SIZE, 0)
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred wanted;
                setp.gt.s32 wanted, $2, 0;
                @wanted cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.b32 $0, 0;
            }
            """,
            "=r,l,r",
            [(weight_ptr + row.to(tl.int64) * INPUTS + start).to(tl.int64), size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch_columns(weight, first, IN: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr):
    """Fetches COLUMNS columns (a power of two from 16), `first` and behind it, of a weight (IN, OUT) into L2.
    The programs of axis 0 share them and fetch a part each: to be called by all."""
    SECTOR: tl.constexpr = 256 // weight.dtype.element_ty.primitive_bitwidth  # 32 bytes
    SECTORS: tl.constexpr = COLUMNS // SECTOR
    ROWS: tl.constexpr = max(1, 128 // SECTORS)  # at a time: one sector a thread
    column = tl.minimum(first + tl.arange(0, SECTORS) * SECTOR, OUT - 1)
    for start in range(tl.program_id(0) * ROWS, IN, tl.num_programs(0) * ROWS):
        row = tl.minimum(start + tl.arange(0, ROWS), IN - 1)
        _fetch(weight + row[:, None] * OUT + column[None, :])


@triton.jit
def _fetch(pointers):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
