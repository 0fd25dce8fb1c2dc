"""Fetching weights into the L2 cache before the kernel that multiplies by them begins.

A decode step of a small batch takes as long as reading all weights, if the memory is never idle. But each of
its kernels waits for the one in front, and attention hardly reads anything. So each kernel also asks for a
share of the weights that follow (`cp.async.bulk.prefetch.L2`, from Hopper on, which is not waited for).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE = 128  # bytes of a cache line


@dataclass(frozen=True)
class Ahead:
    """`weights`: (any,) contiguous, what a kernel asks for."""

    weights: Tensor

    def options(self, programs: int, warps: int) -> dict[str, object]:
        """What to pass to a kernel of so many programs that calls `prefetch`."""
        size = self.weights.numel() * self.weights.element_size()
        threads = programs * warps * 32
        share = triton.cdiv(triton.cdiv(size, threads), LINE) * LINE
        return {"ahead_ptr": self.weights, "ahead_bytes": size, "AHEAD": share}


def options(ahead: Ahead | None, programs: int, warps: int) -> dict[str, object]:
    """The same for a kernel that may have nothing to ask for."""
    return {} if ahead is None else ahead.options(programs, warps)


def supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def prefetch(ahead_ptr, ahead_bytes, program, AHEAD: tl.constexpr):
    """Each thread of program `program` asks for AHEAD bytes."""
    THREADS: tl.constexpr = tl.extra.cuda.num_threads()
    thread = program * THREADS + tl.arange(0, THREADS)
    first = thread.to(tl.int64) * AHEAD
    size = tl.minimum(ahead_bytes - first, AHEAD).to(tl.int32)
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
        [ahead_ptr.to(tl.int64) + first, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
