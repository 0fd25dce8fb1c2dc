"""Finding the last program to arrive: programs that share an output count themselves, and the one that finds
all others counted before it puts their partial results together. So a split reduction needs no second kernel,
and its order of summation stays fixed.

A kernel takes `counters` and returns every counter to zero. Kernels that run one after the other share them;
kernels with such counters must not run on several streams at the same time.
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
    """(COUNTERS,) int32, all zero between kernels; made at the first call, which must not be under graph
    capture."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def is_last(counter, programs):
    """Called by each of `programs` programs after its stores. True for the last one, which may then load what
    all have stored (with cache_modifier=".cg": other SMs wrote it); the counter is zero again."""
    tl.debug_barrier()  # all threads' stores come before the one thread's count
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last
