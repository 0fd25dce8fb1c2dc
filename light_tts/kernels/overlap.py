"""Starts a kernel before the previous one has ended (programmatic dependent launch, from Hopper on): it is
launched early, prefetches its weights into the L2 cache, and only then waits.

In a chain of small kernels this hides launch latency and keeps the memory busy. With large kernels the
waiting programs occupy resources that the running ones could use, so it is enabled depending on size.

A kernel of such a chain calls `begin` before it writes anything, and before it reads what a kernel of the
chain writes. Weights and tables that describe the batch may be read earlier, but even those must not be
written by the previous kernel, whose results are only guaranteed to be visible after the wait. Every kernel
waits, so none runs ahead of two others. Loads stay on their side of the wait: Triton makes both of them
volatile assembly, which is not reordered.

A program with nothing to do may return before `begin`, because a grid ends only with its last program, hence
not before those that wait. If all programs returned, the next kernel would no longer wait for the earlier
ones. The flow's kernels agree about which rows exist, so in that case (a graph recorded without a sequence)
none of them has any data.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from light_tts.kernels import configs


def enabled(device: torch.device, kernel: str, rows: int) -> bool:
    """Return whether overlap was measured to be faster for this number of rows on this GPU: for "llm", all
    kernels of a decode step (rows: tokens of the batch), or for one of the flow's, `packed_linear` with its
    sizes (rows of the packed batch, all copies)."""
    ranges = configs.load(device).get("overlap", {}).get(kernel, [])
    return any(first <= rows <= last for first, last in ranges)


def options(device: torch.device, kernel: str, rows: int) -> dict[str, bool]:
    """Return the options for a kernel with the parameter `OVERLAP: tl.constexpr = False`. The previous kernel
    may be any: if it does not call `begin`, this one is launched when it has ended."""
    return {"OVERLAP": True, "launch_pdl": True} if enabled(device, kernel, rows) else {}


@triton.jit
def begin():
    """Let the next kernel start and wait for all results of the previous one."""
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
    """Prefetch the inputs [input, input + SHARE) of BLOCK_OUT rows from `output` on of a weight (OUTPUTS,
    INPUTS) into L2, each thread a piece of a row."""
    SIZE: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    THREADS: tl.constexpr = tl.extra.cuda.num_threads()
    PIECES: tl.constexpr = (THREADS + BLOCK_OUT - 1) // BLOCK_OUT
    PIECE: tl.constexpr = ((SHARE + PIECES - 1) // PIECES * SIZE + 15) // 16 * 16 // SIZE
    if INPUTS * SIZE % 16 == 0:  # pieces have 16 bytes
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
def prefetch_columns(weight_ptr, first, IN: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr):
    """Prefetch COLUMNS columns (a power of two from 16), starting at `first`, of a weight (IN, OUT) into L2.
    The programs of axis 0 share the work, so all of them must call it."""
    SECTOR: tl.constexpr = 256 // weight_ptr.dtype.element_ty.primitive_bitwidth  # 32 bytes
    SECTORS: tl.constexpr = COLUMNS // SECTOR
    ROWS: tl.constexpr = max(1, 128 // SECTORS)  # at a time: one sector per thread
    column = tl.minimum(first + tl.arange(0, SECTORS) * SECTOR, OUT - 1)
    for start in range(tl.program_id(0) * ROWS, IN, tl.num_programs(0) * ROWS):
        row = tl.minimum(start + tl.arange(0, ROWS), IN - 1)
        _fetch(weight_ptr + row[:, None] * OUT + column[None, :])


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
