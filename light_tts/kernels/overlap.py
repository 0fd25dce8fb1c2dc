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
def prefetch(weight_ptr, outputs, first, INPUTS: tl.constexpr, SHARE: tl.constexpr):
    """Fetches the inputs [first, first + SHARE) of the rows `outputs` of a weight (any, INPUTS) into L2."""
    LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
    rows = weight_ptr + outputs[:, None].to(tl.int64) * INPUTS
    for start in tl.static_range(0, SHARE, 8 * LINE):
        i = tl.minimum(first + start + tl.arange(0, 8) * LINE, INPUTS - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [(rows + i[None, :]).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
