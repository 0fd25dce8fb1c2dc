"""Detects the last program to finish: programs that share an output count themselves, and the last one
combines their partial results. So a split reduction needs no second kernel, and its order of summation is
fixed.

A kernel takes `counters` and returns every counter to zero. Kernels that run sequentially share them; kernels
with such counters must not run concurrently on several streams.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 1 << 16


@cache
def counters(device: torch.device) -> Tensor:
    """Return (COUNTERS,) int32, all zero between kernels. Created at the first call, which must not be during
    graph capture."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def is_last(counter_ptr, programs):
    """Called by each of `programs` programs after its stores. Returns True in the last one, which may then
    load what all have stored (with cache_modifier=".cg", because other SMs wrote it); the counter is zero
    again."""
    tl.debug_barrier()  # the stores of all threads precede the increment by one thread
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last
