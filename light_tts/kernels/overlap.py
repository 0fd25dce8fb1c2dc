"""Letting a kernel begin before the one in front of it has ended (programmatic dependent launch, from Hopper
on): it is launched early, fetches its weights into the L2 cache, and only then waits.

In a chain of small kernels this hides their launch and keeps the memory busy. A kernel of such a chain calls
`begin` before it touches anything but weights; every one waits, so that none runs ahead of two others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from light_tts.kernels import configs


def enabled(device: torch.device) -> bool:
    """Whether it was measured to be faster on this GPU."""
    return bool(configs.load(device).get("overlap", False))


def options(device: torch.device) -> dict[str, bool]:
    """What to pass to a kernel that has the parameter `OVERLAP: tl.constexpr = False`. The kernel in front
    may be any: one that does not call `begin` is waited for before this one is launched."""
    return {"OVERLAP": True, "launch_pdl": True} if enabled(device) else {}


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
